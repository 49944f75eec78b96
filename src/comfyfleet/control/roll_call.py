"""Which workers are there, asked by knocking: for a control plane that takes an endpoint over from a dead one.

An idle worker reports each ten seconds only, and need not be waited for if its door opens. Nothing is said to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

import anyio

from comfyfleet.control.worker import Worker
from comfyfleet.control.worker_states import WorkerState

# Longer than the time between two reports of an idle worker.
TRUSTED_S = 12.0
_KNOCK_S = 0.5
_AT_ONCE = 100


async def answering(workers: Iterable[Worker]) -> frozenset[int]:
    """Ids of those that were idle, and accept a connection within half a second."""
    there: set[int] = set()
    limiter = anyio.CapacityLimiter(_AT_ONCE)

    async def knock(worker: Worker) -> None:
        parts = urlsplit(worker.url)
        async with limiter:
            try:
                port = parts.port or (443 if parts.scheme == "https" else 80)
                await (await anyio.connect_tcp(parts.hostname or "", port)).aclose()
            except (OSError, ValueError):
                return
        there.add(worker.id)

    with anyio.move_on_after(_KNOCK_S):
        async with anyio.create_task_group() as knocking:
            for worker in workers:
                if worker.url and worker.state is WorkerState.IDLE and not worker.intent:
                    knocking.start_soon(knock, worker)
    return frozenset(there)
