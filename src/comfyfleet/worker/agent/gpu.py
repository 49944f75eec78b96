"""What graphics card this worker has, by NVML where there is one. A machine without is a worker too: "cpu"."""

from __future__ import annotations

import pynvml


def gpu_name() -> str:
    """The first card's name as its driver gives it, else "cpu"."""
    try:
        pynvml.nvmlInit()
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
    except pynvml.NVMLError:
        return "cpu"
    return name.decode() if isinstance(name, bytes) else str(name)
