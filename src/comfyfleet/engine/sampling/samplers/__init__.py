"""Samplers by ComfyUI's names: one function each, its source in its docstring.

Each is called as `sampler(run, x)`; see `sampling/run.py`. To add one: write the function, add its line here.
"""

from __future__ import annotations

from comfyfleet.engine.sampling.run import Sampler
from comfyfleet.engine.sampling.samplers.er_sde import er_sde
from comfyfleet.engine.sampling.samplers.euler import euler

SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "er_sde": er_sde,
    "ddim": euler,
}
