"""After a restart: the graphs of jobs from the journal, and which engine still has which prompt.

Engines that we start ended with us and have none.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from comfyfleet.clock import Clock
from comfyfleet.wire.errors import FleetError
from comfyfleet.wire.workflow import Graph
from comfyfleet.worker.engines.client import EngineGone
from comfyfleet.worker.engines.meeting import meet
from comfyfleet.worker.engines.pool import EnginePool, EngineSlot
from comfyfleet.worker.job import Job
from comfyfleet.worker.stages.prepare import build_graph
from comfyfleet.worker.templates import Templates

log = structlog.get_logger()

# A foreign engine that does not answer within this has lost its prompts, as far as anybody can tell.
PATIENCE_S = 60.0


def graph_again(job: Job, templates: Templates) -> Graph:
    """The job's graph; empty for one that cannot be built any more (its template changed), which then fails."""
    try:
        return build_graph(job.request, templates)
    except FleetError as problem:
        log.warning("journal.unfit", job=job.id, error=problem.message)
        return {}


async def whose(pool: EnginePool, prompt_ids: Sequence[str], clock: Clock) -> dict[str, EngineSlot]:
    """The engine that has (or has finished) each prompt; prompts that none knows are not in the answer."""
    found: dict[str, EngineSlot] = {}
    deadline = clock.monotonic() + PATIENCE_S
    for slot in pool.slots:
        while not slot.owned:
            try:
                await meet(slot)
                # Queue, history, queue: between the first two a prompt may be in neither.
                before = await slot.client.queue()
                done = {one for one in prompt_ids if await slot.client.history(one) is not None}
                after = await slot.client.queue()
                found.update({one: slot for one in prompt_ids if one in before or one in done or one in after})
                break
            except EngineGone:
                if clock.monotonic() >= deadline:
                    break
                await clock.sleep(0.5)
    return found
