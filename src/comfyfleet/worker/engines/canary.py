"""Readiness by doing: a four-millisecond picture through the engine's real path. HTTP health alone proves nothing.

EmptyImage → PreviewImage, with a colour of its own each time so that the cache cannot answer. Preview, so that nothing
is left in the output folder.
"""

from __future__ import annotations

import anyio

from comfyfleet.clock import Clock
from comfyfleet.ids import Ids
from comfyfleet.wire.errors import WorkflowRefused
from comfyfleet.wire.workflow import Graph
from comfyfleet.worker.engines.client import EngineClient, EngineGone

TIMEOUT_S = 60.0
_POLL_S = 0.05


def canary_graph(ids: Ids) -> Graph:
    """The picture; its colour is new."""
    color = ids.random_int() % 0xFFFFFF
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": color}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }


async def sing(client: EngineClient, *, clock: Clock, ids: Ids, timeout_s: float = TIMEOUT_S) -> str | None:
    """None when the engine rendered the canary, else why not."""
    prompt_id = f"canary-{ids.request_id()}"
    try:
        with anyio.fail_after(timeout_s):
            await client.submit(canary_graph(ids), prompt_id)
            while (entry := await client.history(prompt_id)) is None:
                await clock.sleep(_POLL_S)
    except TimeoutError:
        return f"a trivial picture was not done within {timeout_s:g} s"
    except (EngineGone, WorkflowRefused) as problem:
        return str(problem)
    if entry.status.get("status_str") == "success":
        return None
    error = entry.message("execution_error") or {}
    return f"a trivial picture failed: {error.get('exception_message', 'no reason given')}"
