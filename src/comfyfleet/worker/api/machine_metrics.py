"""Metrics that are read when somebody scrapes: how the start went, stage by stage, what the cards do, the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from comfyfleet.gpu import GpuFacts
from comfyfleet.worker.agent.startup import Startup


class MachineMetrics(Collector):
    """Register it once; `cards` gives what was last read from the driver."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        startup: Startup,
        cards: Callable[[], Iterable[GpuFacts]],
        free_bytes: Callable[[], int],
    ) -> None:
        self._startup = startup
        self._cards = cards
        self._free_bytes = free_bytes
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        stages = GaugeMetricFamily(
            "comfyfleet_startup_seconds", "The cold start by stage, of the stages that are over.", labels=["stage"]
        )
        for stage, seconds in self._startup.seconds.items():
            stages.add_metric([stage], seconds)
        yield stages
        yield GaugeMetricFamily(
            "comfyfleet_load_seconds", "From the start of the process to Ready; 0 before.", self._startup.loadtime_s
        )
        yield GaugeMetricFamily("comfyfleet_disk_free_bytes", "Free on the output disk.", self._free_bytes())
        labels = ["gpu", "name", "driver"]
        figures = {
            "memory_total_bytes": GaugeMetricFamily("comfyfleet_gpu_memory_total_bytes", "Memory.", labels=labels),
            "memory_used_bytes": GaugeMetricFamily("comfyfleet_gpu_memory_used_bytes", "In use.", labels=labels),
            "temperature_c": GaugeMetricFamily("comfyfleet_gpu_temperature_celsius", "Temperature.", labels=labels),
            "sm_clock_mhz": GaugeMetricFamily("comfyfleet_gpu_sm_clock_mhz", "SM clock.", labels=labels),
            "memory_clock_mhz": GaugeMetricFamily("comfyfleet_gpu_memory_clock_mhz", "Memory clock.", labels=labels),
            "power_w": GaugeMetricFamily("comfyfleet_gpu_power_watts", "Power drawn.", labels=labels),
        }
        throttling = GaugeMetricFamily(
            "comfyfleet_gpu_throttling", "1: the clocks are held down for this reason.", labels=[*labels, "reason"]
        )
        for card in self._cards():
            names = [str(card.index), card.name, card.driver]
            for name, family in figures.items():
                family.add_metric(names, float(getattr(card, name)))
            for reason in card.throttling:
                throttling.add_metric([*names, reason], 1.0)
        yield from figures.values()
        yield throttling
