"""Prompts that wait, the one that runs, and those that ended: ComfyUI's queue and history, in memory only."""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import anyio

MAX_HISTORY = 10_000
SECRET_EXTRAS = ("auth_token_comfy_org", "api_key_comfy_org")


@dataclass(frozen=True, kw_only=True)
class QueuedPrompt:
    """An accepted prompt. Lower numbers run first."""

    number: float
    prompt_id: str
    prompt: dict[str, Any]
    extra_data: dict[str, Any]
    outputs: list[str]

    @property
    def client_id(self) -> str | None:
        return self.extra_data.get("client_id")

    def listed(self) -> list[Any]:
        """As `GET /queue` shows it."""
        return [self.number, self.prompt_id, self.prompt, self.extra_data, self.outputs]

    def remembered(self) -> list[Any]:
        """As history shows it: without the keys that must not be kept."""
        extra = {name: value for name, value in self.extra_data.items() if name not in SECRET_EXTRAS}
        return [self.number, self.prompt_id, self.prompt, extra, self.outputs]


class PromptQueue:
    """Prompts by number, ties in order of arrival."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, QueuedPrompt]] = []
        self._arrivals = itertools.count()
        self._counter = 0
        self._arrived = anyio.Event()
        self.running: list[QueuedPrompt] = []  # in the order in which they were taken

    def next_number(self, *, front: bool) -> int:
        """The number of a prompt that brings none; it goes on counting even when the prompt is then refused."""
        number = -self._counter if front else self._counter
        self._counter += 1
        return number

    def put(self, item: QueuedPrompt) -> None:
        heapq.heappush(self._heap, (item.number, next(self._arrivals), item))
        self._arrived.set()

    async def take(self) -> QueuedPrompt:
        """Wait for the next prompt; it is `running` from now on, until `ended`."""
        while (item := self.take_now()) is None:
            await self.until_arrival()
        return item

    def take_now(self) -> QueuedPrompt | None:
        """The next prompt, if one waits."""
        if not self._heap:
            return None
        item = heapq.heappop(self._heap)[2]
        self.running.append(item)
        return item

    async def until_arrival(self) -> None:
        """Wait for a prompt to come, or for `stir`."""
        self._arrived = anyio.Event()
        await self._arrived.wait()

    def stir(self) -> None:
        """Wake whoever waits for a prompt: something else changed."""
        self._arrived.set()

    def ended(self, item: QueuedPrompt) -> None:
        self.running = [other for other in self.running if other is not item]

    def delete(self, prompt_ids: Collection[str]) -> bool:
        """Forget those that wait; True when there was one."""
        kept = [entry for entry in self._heap if entry[2].prompt_id not in prompt_ids]
        changed = len(kept) < len(self._heap)
        heapq.heapify(kept)
        self._heap = kept
        return changed

    def clear(self) -> bool:
        changed = bool(self._heap)
        self._heap = []
        return changed

    def pending(self) -> list[QueuedPrompt]:
        return [entry[2] for entry in self._heap]

    @property
    def remaining(self) -> int:
        return len(self._heap) + len(self.running)


@dataclass(kw_only=True)
class PromptRecord:
    """What becomes a history entry: messages while it runs, outputs when it ended."""

    item: QueuedPrompt
    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def entry(
        self, *, outputs: dict[str, Any], success: bool, miniature: bool, resident_models: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """resident_models: files with a model in memory after the run; ours, like `miniature`."""
        meta: dict[str, Any] = {
            node_id: {"node_id": node_id, "display_node": node_id, "parent_node": None, "real_node_id": node_id}
            for node_id in outputs
        }
        if miniature:
            meta["miniature"] = True
        if resident_models:
            meta["resident_models"] = list(resident_models)
        return {
            "prompt": self.item.remembered(),
            "outputs": outputs,
            "status": {
                "status_str": "success" if success else "error",
                "completed": success,
                "messages": [list(message) for message in self.messages],
            },
            "meta": meta,
        }


class History:
    """Ended prompts in order of completion; the oldest go first when there are too many."""

    def __init__(self, limit: int = MAX_HISTORY) -> None:
        self._limit = limit
        self._entries: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def add(self, prompt_id: str, entry: dict[str, Any]) -> None:
        self._entries[prompt_id] = entry
        while len(self._entries) > self._limit:
            self._entries.popitem(last=False)

    def get(self, prompt_id: str) -> dict[str, Any]:
        """One entry under its id, or {}."""
        entry = self._entries.get(prompt_id)
        return {prompt_id: entry} if entry is not None else {}

    def page(self, max_items: int | None, offset: int) -> dict[str, Any]:
        """`offset` below 0 with max_items: the newest ones."""
        names = list(self._entries)
        if offset < 0 and max_items is not None:
            offset = max(0, len(names) - max_items)
        offset = max(0, offset)
        chosen = names[offset : offset + max_items] if max_items is not None else names[offset:]
        return {name: self._entries[name] for name in chosen}

    def delete(self, prompt_ids: Collection[str]) -> None:
        for prompt_id in prompt_ids:
            self._entries.pop(prompt_id, None)

    def clear(self) -> None:
        self._entries.clear()
