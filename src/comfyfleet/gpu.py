"""The graphics cards of this machine by NVML where there is one. A machine without is a worker too: "cpu"."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import msgspec

# NVML's bits for why clocks are held down, by the names that users know from nvidia-smi.
_REASONS = (
    (0x0000000000000002, "applications_clocks"),
    (0x0000000000000004, "sw_power_cap"),
    (0x0000000000000008, "hw_slowdown"),
    (0x0000000000000020, "sw_thermal"),
    (0x0000000000000040, "hw_thermal"),
    (0x0000000000000080, "hw_power_brake"),
)


class GpuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One card, as its driver tells now. Unknown numbers are 0. throttling: why its clocks are held down."""

    index: int
    name: str
    driver: str = ""
    memory_total_bytes: int = 0
    memory_used_bytes: int = 0
    temperature_c: int = 0
    sm_clock_mhz: int = 0
    sm_clock_max_mhz: int = 0
    memory_clock_mhz: int = 0
    power_w: float = 0.0
    throttling: tuple[str, ...] = ()


def gpu_name() -> str:
    """The first card's name as its driver gives it, else "cpu"."""
    cards = gpu_facts()
    return cards[0].name if cards else "cpu"


def gpu_facts() -> list[GpuFacts]:
    """Every card; [] where there is no driver, or not the wheel that asks it. Blocking, a few milliseconds."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        return [_card(pynvml, index, driver) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def throttling_of(mask: int) -> tuple[str, ...]:
    """Names of the bits that mean a card is slower than it could be; idle is none of them."""
    return tuple(name for bit, name in _REASONS if mask & bit)


def _card(nvml: ModuleType, index: int, driver: str) -> GpuFacts:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def asked(question: Callable[..., Any], *words: Any) -> Any:
        """The answer, or None: many cards lack one figure or another."""
        try:
            return question(handle, *words)
        except nvml.NVMLError:
            return None

    memory = asked(nvml.nvmlDeviceGetMemoryInfo)
    return GpuFacts(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        driver=driver,
        memory_total_bytes=int(memory.total) if memory else 0,
        memory_used_bytes=int(memory.used) if memory else 0,
        temperature_c=int(asked(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU) or 0),
        sm_clock_mhz=int(asked(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM) or 0),
        sm_clock_max_mhz=int(asked(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM) or 0),
        memory_clock_mhz=int(asked(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM) or 0),
        power_w=round((asked(nvml.nvmlDeviceGetPowerUsage) or 0) / 1000.0, 1),
        throttling=throttling_of(int(asked(nvml.nvmlDeviceGetCurrentClocksThrottleReasons) or 0)),
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
