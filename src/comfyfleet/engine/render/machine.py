"""The executor of a process that has torch, and what its devices are. Importing this loads torch and all nodes."""

from __future__ import annotations

import psutil
import torch

from comfyfleet.clock import Clock
from comfyfleet.engine.cache import ResultCache
from comfyfleet.engine.executor import Executor
from comfyfleet.engine.folders import EngineFolders
from comfyfleet.engine.memory import Residency, default_cache_bytes
from comfyfleet.engine.miniatures import ensure
from comfyfleet.engine.models.compiling import BACKEND
from comfyfleet.engine.nodes import all_nodes
from comfyfleet.engine.render.messages import Device
from comfyfleet.engine.render.setup import RenderSettings
from comfyfleet.wire.errors import Unprocessable

MODEL_SHARE = 0.85  # of a device's memory; the rest is for activations


class DeviceUnusable(Unprocessable):
    """This machine's torch cannot compute there."""

    code = "device_unusable"


def make_executor(settings: RenderSettings, folders: EngineFolders, clock: Clock) -> Executor:
    """Call once, on the thread that will render: gradients are off for it. Makes missing miniatures first.

    Raises DeviceUnusable.
    """
    torch.set_grad_enabled(False)
    try:
        total = devices(settings.device)[0].vram_total
    except (AssertionError, RuntimeError) as problem:  # torch's words for: built without CUDA, no such GPU, no driver
        raise DeviceUnusable(f"{settings.device} cannot be used by torch {torch.__version__}: {problem}") from problem
    ensure(settings.miniatures_dir)
    return Executor(
        registry=all_nodes(),
        folders=folders,
        cache=ResultCache(settings.cache_bytes or default_cache_bytes()),
        residency=Residency(
            settings.device,
            settings.model_bytes or int(total * MODEL_SHARE),
            BACKEND if settings.compiles and settings.device.startswith("cuda") else None,
        ),
        clock=clock,
    )


def devices(device: str) -> list[Device]:
    """The device models compute on. On a CPU its memory is the machine's."""
    if device.startswith("cuda"):
        index = torch.device(device).index or 0
        free, total = torch.cuda.mem_get_info(index)
        reserved = torch.cuda.memory_reserved(index)
        return [
            Device(
                name=f"cuda:{index} {torch.cuda.get_device_name(index)}",
                type="cuda",
                index=index,
                vram_total=total,
                vram_free=free,
                torch_vram_total=reserved,
                torch_vram_free=reserved - torch.cuda.memory_allocated(index),
            )
        ]
    memory = psutil.virtual_memory()
    return [
        Device(
            name="cpu",
            type="cpu",
            index=None,
            vram_total=memory.total,
            vram_free=memory.available,
            torch_vram_total=memory.total,
            torch_vram_free=memory.available,
        )
    ]
