"""Why this worker is or is not Ready, as a value. The known wrapper's fields first, then ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfyfleet.worker.engines.pool import EngineSlot, EngineState
from comfyfleet.worker.queue import QueueView


def health_report(slots: Sequence[EngineSlot], view: QueueView, *, is_ready: bool, is_draining: bool) -> dict[str, Any]:
    """The body of `/health`."""
    ready = sum(slot.state is EngineState.READY for slot in slots)
    reasons = [f"{slot.name}: {slot.reason or slot.state.value}" for slot in slots if slot.reason]
    return {
        "status": "healthy" if is_ready else "unhealthy",
        "cache_type": "sqlite",
        "queues": {"waiting": view.waiting, "generating": view.generating, "storing": view.storing},
        "backends_healthy": f"{ready}/{len(slots)}",
        "backends": [
            {
                "name": slot.name,
                "url": slot.client.base_url,
                "state": slot.state.value,
                "reason": slot.reason,
                "gpu": slot.gpu,
                "prompts": len(slot.bookings),
                "restarts": slot.restarts,
                "socket": slot.client.connected.is_set(),
            }
            for slot in slots
        ],
        "ready": is_ready,
        "reason": "draining" if is_draining else "; ".join(reasons),
    }
