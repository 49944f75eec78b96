"""After a restart: which engine still has which prompt. Engines that we start ended with us and have none."""

from __future__ import annotations

from collections.abc import Sequence

from comfyfleet.clock import Clock
from comfyfleet.worker.engines.client import EngineGone
from comfyfleet.worker.engines.pool import EnginePool, EngineSlot

# A foreign engine that does not answer within this has lost its prompts, as far as anybody can tell.
PATIENCE_S = 60.0


async def whose(pool: EnginePool, prompt_ids: Sequence[str], clock: Clock) -> dict[str, EngineSlot]:
    """The engine that has (or has finished) each prompt; prompts that none knows are not in the answer."""
    found: dict[str, EngineSlot] = {}
    deadline = clock.monotonic() + PATIENCE_S
    for slot in pool.slots:
        while not slot.owned:
            try:
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
