"""Samplers by ComfyUI's names and in its order: one function each, its source in its docstring.

Each is called as `sampler(run, x)`; see `sampling/run.py`. To add one: write the function, add its line here.
"""

from __future__ import annotations

from comfyfleet.engine.sampling.run import Sampler
from comfyfleet.engine.sampling.samplers import (
    dpm,
    dpmpp,
    dpmpp_sde,
    er_sde,
    euler,
    multistep,
    renoise,
    res,
    sa_solver,
    seeds,
    uni_pc,
)

SAMPLERS: dict[str, Sampler] = {
    "euler": euler.euler,
    "euler_cfg_pp": euler.euler_cfg_pp,
    "euler_ancestral": euler.euler_ancestral,
    "euler_ancestral_cfg_pp": euler.euler_ancestral_cfg_pp,
    "heun": euler.heun,
    "heunpp2": euler.heunpp2,
    "dpm_2": dpm.dpm_2,
    "dpm_2_ancestral": dpm.dpm_2_ancestral,
    "lms": multistep.lms,
    "dpm_fast": dpm.dpm_fast,
    "dpm_adaptive": dpm.dpm_adaptive,
    "dpmpp_2s_ancestral": dpmpp.dpmpp_2s_ancestral,
    "dpmpp_2s_ancestral_cfg_pp": dpmpp.dpmpp_2s_ancestral_cfg_pp,
    "dpmpp_sde": dpmpp_sde.dpmpp_sde,
    "dpmpp_sde_gpu": dpmpp_sde.dpmpp_sde_gpu,
    "dpmpp_2m": dpmpp.dpmpp_2m,
    "dpmpp_2m_cfg_pp": dpmpp.dpmpp_2m_cfg_pp,
    "dpmpp_2m_sde": dpmpp_sde.dpmpp_2m_sde,
    "dpmpp_2m_sde_gpu": dpmpp_sde.dpmpp_2m_sde_gpu,
    "dpmpp_2m_sde_heun": dpmpp_sde.dpmpp_2m_sde_heun,
    "dpmpp_2m_sde_heun_gpu": dpmpp_sde.dpmpp_2m_sde_heun_gpu,
    "dpmpp_3m_sde": dpmpp_sde.dpmpp_3m_sde,
    "dpmpp_3m_sde_gpu": dpmpp_sde.dpmpp_3m_sde_gpu,
    "ddpm": renoise.ddpm,
    "lcm": renoise.lcm,
    "ipndm": multistep.ipndm,
    "ipndm_v": multistep.ipndm_v,
    "deis": multistep.deis,
    "res_multistep": res.res_multistep,
    "res_multistep_cfg_pp": res.res_multistep_cfg_pp,
    "res_multistep_ancestral": res.res_multistep_ancestral,
    "res_multistep_ancestral_cfg_pp": res.res_multistep_ancestral_cfg_pp,
    "gradient_estimation": res.gradient_estimation,
    "gradient_estimation_cfg_pp": res.gradient_estimation_cfg_pp,
    "er_sde": er_sde.er_sde,
    "seeds_2": seeds.seeds_2,
    "seeds_3": seeds.seeds_3,
    "sa_solver": sa_solver.sa_solver,
    "sa_solver_pece": sa_solver.sa_solver_pece,
    "ddim": euler.euler,  # eta 0; only its masked runs differ, by their own noise (see sample.py)
    "uni_pc": uni_pc.uni_pc,
    "uni_pc_bh2": uni_pc.uni_pc_bh2,
}
