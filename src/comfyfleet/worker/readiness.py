"""Why this worker is or is not Ready, as a value. The known wrapper's fields first, then ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfyfleet.worker.engines.pool import EngineSlot, EngineState
from comfyfleet.worker.queue import QueueView

FAILED_STARTS = 3


def health_report(slots: Sequence[EngineSlot], view: QueueView, *, is_ready: bool, why: str) -> dict[str, Any]:
    """The body of `/health`. why: a reason of the whole worker, before those of its engines."""
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
        "reason": why or "; ".join(reasons),
    }


def start_failure(slots: Sequence[EngineSlot]) -> str:
    """Why no engine ever came up, once each of ours has failed often enough to call it a reason; else ""."""
    if not slots or any(slot.version or slot.restarts < FAILED_STARTS for slot in slots):
        return ""
    return f"{slots[0].name} does not start: {slots[0].reason}"
