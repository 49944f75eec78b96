"""The engines of this worker and who may use which: late binding with a little prefetch.

A prompt is handed to the engine before the one in front of it ends, so that the engine never waits for us; but only a
little before, because what is bound to an engine cannot move to another that frees earlier. `has_room` is that rule.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import anyio

from comfyfleet.clock import Clock
from comfyfleet.wire.errors import EngineUnavailable
from comfyfleet.worker.engines.client import EngineClient
from comfyfleet.worker.engines.faults import FaultKind
from comfyfleet.worker.engines.watch import PromptWatch

MAX_BOUND = 8
AHEAD_S = 0.25


class EngineState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    UNREACHABLE = "unreachable"
    RESTARTING = "restarting"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, kw_only=True)
class Booking:
    """A prompt in an engine's hands. predicted_s: what it is expected to take."""

    predicted_s: float
    bound_at: float


@dataclass(kw_only=True, eq=False)
class EngineSlot:
    """One engine. `owned`: we start and restart its process."""

    name: str
    client: EngineClient
    owned: bool
    folders: Mapping[str, Path]  # the engine's own, by type: output, temp, input
    is_remote: bool = False  # its folders cannot be seen from here
    gpu: str = ""
    state: EngineState = EngineState.STARTING
    reason: str = "starting"
    bookings: dict[str, Booking] = field(default_factory=dict)
    watches: dict[str, PromptWatch] = field(default_factory=dict)
    version: str = ""  # ComfyUI's, as the engine says
    uploads: Mapping[str, frozenset[str]] | None = None  # inputs that take files, by node type; None: not asked yet
    warm: frozenset[str] = frozenset()  # model files in its memory, as far as its last prompt showed
    device_faults: int = 0
    restarts: int = 0
    restart_wanted: anyio.Event = field(default_factory=anyio.Event)
    restart_kind: FaultKind | None = None

    def backlog_s(self, now: float) -> float:
        """Seconds of predicted work still in this engine."""
        left = 0.0
        for index, booking in enumerate(self.bookings.values()):
            elapsed = now - booking.bound_at if index == 0 else 0.0
            left += max(0.0, booking.predicted_s - elapsed)
        return left

    @property
    def takes_work(self) -> bool:
        """It is ready, and nobody asked for its end: one that is to be restarted may hear of it a moment later."""
        return self.state is EngineState.READY and self.restart_kind is None

    def want_restart(self, kind: FaultKind) -> None:
        """Ask the supervisor for a new process (or, for a foreign engine, to stay away until a canary passes)."""
        if self.restart_kind is None:
            self.restart_kind = kind
            self.restart_wanted.set()

    def lose_prompts(self, kind: FaultKind) -> None:
        """The process is gone, and every prompt in it."""
        self.warm = frozenset()
        for watch in self.watches.values():
            watch.lose(kind)


def has_room(waiting_predicted_s: Iterable[float], *, bound: int) -> bool:
    """May an engine with `bound` prompts get one more? waiting_predicted_s: of those that do not run yet.

    One may always wait behind the running one. More only while all that wait are short: then one ahead is not enough
    to bridge the way from the engine to us and back.
    """
    if bound < 2:
        return True
    return bound < MAX_BOUND and sum(waiting_predicted_s) < AHEAD_S


class EnginePool:
    """Hands out engines. Waiters are served first come, first served."""

    def __init__(self, slots: list[EngineSlot], clock: Clock) -> None:
        self.slots = slots
        self._clock = clock
        self._waiters: deque[tuple[anyio.Event, frozenset[str]]] = deque()
        self._known = anyio.Event()  # an engine told what its nodes take, or none ever will

    @property
    def ready(self) -> list[EngineSlot]:
        return [slot for slot in self.slots if slot.takes_work]

    async def until_told(self) -> None:
        """Wait for the first engine to say what its nodes take; or for all hope to be gone."""
        self._note_known()
        await self._known.wait()

    def uploads(self) -> Mapping[str, frozenset[str]]:
        """Inputs that take files, by node type, as far as engines have told."""
        told = [slot.uploads for slot in self.slots if slot.uploads]
        if len(told) == 1:
            return told[0]
        found: dict[str, frozenset[str]] = {}
        for uploads in told:
            for class_type, names in uploads.items():
                found[class_type] = found.get(class_type, frozenset()) | names
        return found

    def _note_known(self) -> None:
        if self.is_hopeless or any(slot.uploads is not None for slot in self.slots):
            self._known.set()

    async def acquire(self, prompt_id: str, predicted_s: float, *, avoid: frozenset[str] = frozenset()) -> EngineSlot:
        """An engine for this prompt, booked; waits for room. `avoid` is honoured while there is another engine.

        Raises EngineUnavailable when every engine is in quarantine.
        """
        self._check_hope()
        if not self._waiters:
            slot = self._choose(avoid)
            if slot is not None:
                return self._book(slot, prompt_id, predicted_s)
        enter = self._waiters.append
        while True:
            turn = anyio.Event()
            entry = (turn, avoid)
            enter(entry)
            try:
                await turn.wait()
            except BaseException:
                if entry in self._waiters:
                    self._waiters.remove(entry)
                else:
                    self.wake()  # the turn was ours; pass it on
                raise
            self._check_hope()
            slot = self._choose(avoid)
            if slot is not None:
                booked = self._book(slot, prompt_id, predicted_s)
                self.wake()
                return booked
            enter = self._waiters.appendleft  # somebody came in between; the first one stays the first

    def adopt(self, slot: EngineSlot, prompt_id: str, predicted_s: float) -> None:
        """Book a prompt that the engine has already."""
        self._book(slot, prompt_id, predicted_s)

    def release(self, slot: EngineSlot, prompt_id: str) -> None:
        slot.bookings.pop(prompt_id, None)
        self.wake()

    def wake(self) -> None:
        """Room may have come up: let the first waiter look. With no engine left to hope for, all look, and leave."""
        self._note_known()
        while self._waiters and self.is_hopeless:
            self._waiters.popleft()[0].set()
        if self._waiters and any(self._has_room(slot) for slot in self.ready):
            turn, _ = self._waiters.popleft()
            turn.set()

    @property
    def is_hopeless(self) -> bool:
        """Every engine is in quarantine: nothing runs here until somebody looks at the machine."""
        return bool(self.slots) and all(slot.state is EngineState.QUARANTINED for slot in self.slots)

    def _check_hope(self) -> None:
        if self.is_hopeless:
            raise EngineUnavailable(f"no engine can work: {self.slots[0].reason}", retry_after_s=60)

    def _choose(self, avoid: frozenset[str]) -> EngineSlot | None:
        now = self._clock.monotonic()
        roomy = [slot for slot in self.ready if self._has_room(slot)]
        preferred = [slot for slot in roomy if slot.name not in avoid] or roomy
        return min(preferred, key=lambda slot: (slot.backlog_s(now), len(slot.bookings)), default=None)

    def _has_room(self, slot: EngineSlot) -> bool:
        waiting = [booking.predicted_s for booking in slot.bookings.values()][1:]
        return has_room(waiting, bound=len(slot.bookings))

    def _book(self, slot: EngineSlot, prompt_id: str, predicted_s: float) -> EngineSlot:
        slot.bookings[prompt_id] = Booking(predicted_s=predicted_s, bound_at=self._clock.monotonic())
        return slot
