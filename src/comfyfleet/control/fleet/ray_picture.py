"""The cluster as it was last seen: its machines, its workers, and whether it still answers.

Kept in `ray-fleet.json`, so that workers are known where a control plane begins before its cluster answers. What this
is not: it asks Ray nothing (`ray` does, and tells what it heard) and decides nothing about a worker (`ray_view`).
Looks end in threads while orders are carried out in the event loop: what an order changed meanwhile stands over what
a look saw, until the next look.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from comfyfleet.clock import Clock
from comfyfleet.control.fleet.base import FleetWorker, Presence, WorkerSpec
from comfyfleet.control.fleet.events import EventLog
from comfyfleet.control.fleet.ray_view import Known, Look, NodeView, findings

# Half of what a look may take: one that was waited for in vain says enough, one that was refused at once does not.
HEAD_LOST_AFTER_S = 2.0


class Picture:
    """path: the file that it is kept in. Every change that a user can notice is told to `events`."""

    def __init__(self, path: Path, events: EventLog, clock: Clock) -> None:
        self._path = path
        self._events = events
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[int, Known] = self._remembered()
        self._nodes: tuple[NodeView, ...] = ()
        self._trouble = "the Ray cluster was not asked yet"
        self._is_lost = False  # and that was said
        self._answered_at = clock.monotonic()

    @property
    def trouble(self) -> str:
        """Why the cluster cannot be asked; empty when it answers."""
        return self._trouble

    @property
    def nodes(self) -> tuple[NodeView, ...]:
        return self._nodes

    def workers(self) -> list[FleetWorker]:
        with self._lock:
            return [known.seen for known in self._known.values()]

    def known(self) -> Mapping[int, Known]:
        """A copy, by worker id. Taken before the cluster is asked, `answered` tells by it what changed meanwhile."""
        with self._lock:
            return dict(self._known)

    # --- what was ordered ----------------------------------------------------------------------------------------
    def placed(self, spec: WorkerSpec) -> None:
        """Ray took it; a repeat changes nothing."""
        with self._lock:
            before = self._known.get(spec.id)
            if before is None or before.incarnation != spec.incarnation:
                seen = FleetWorker(id=spec.id, presence=Presence.RUNNING, started_at=self._clock.now())
                self._known[spec.id] = Known(seen=seen, incarnation=spec.incarnation)

    def stopped(self, known: Known) -> None:
        """known: the worker as it was when its stop was ordered."""
        number = known.seen.id
        stopped = FleetWorker(id=number, presence=Presence.STOPPED, started_at=known.seen.started_at)
        with self._lock:
            self._known[number] = Known(seen=stopped, node_id=known.node_id, incarnation=known.incarnation)

    def destroyed(self, worker_id: int) -> None:
        with self._lock:
            self._known.pop(worker_id, None)

    # --- what was seen -------------------------------------------------------------------------------------------
    def answered(self, look: Look, asked: Mapping[int, Known]) -> Sequence[tuple[str, int]]:
        """Take in what the cluster shows. asked: what was `known` when it was asked. Returns `Findings.leftovers`."""
        if self._trouble:
            self._events.add("head.joined", f"{len(look.nodes)} machines are in the cluster")
        self._trouble, self._is_lost, self._answered_at = "", False, self._clock.monotonic()
        self._note_nodes(look.nodes)
        found = findings(look, asked)
        with self._lock:
            for number in {*found.known, *asked}:
                # Changed while we looked: the next look will see it as it is.
                if self._known.get(number) == asked.get(number) and number in found.known:
                    self._note_worker(self._known.get(number), found.known[number])
                    self._known[number] = found.known[number]
        return found.leftovers

    def unanswered(self, why: str) -> float:
        """Asked in vain: what is known stays. Returns for how long it has not answered, in seconds."""
        silent_s = self._clock.monotonic() - self._answered_at
        text = f"{why}; workers that run serve on, and nothing new starts until it answers"
        if not self._is_lost and silent_s > HEAD_LOST_AFTER_S:
            self._is_lost = True
            self._events.add("head.lost", text)
        if self._is_lost or self._trouble:
            self._trouble = text
        return silent_s

    def wait_anew(self) -> None:
        """It will be asked over another connection, whose silence begins now."""
        self._answered_at = self._clock.monotonic()

    def keep(self) -> None:
        """Write down the workers, if they changed."""
        with self._lock:
            encoded = msgspec.json.encode(tuple(self._known.values()))
        with contextlib.suppress(OSError):
            if not self._path.exists() or self._path.read_bytes() != encoded:
                draft = self._path.with_suffix(".new")
                draft.write_bytes(encoded)
                draft.replace(self._path)

    def _remembered(self) -> dict[int, Known]:
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return {one.seen.id: one for one in msgspec.json.decode(self._path.read_bytes(), type=tuple[Known, ...])}
        return {}

    def _note_nodes(self, nodes: tuple[NodeView, ...]) -> None:
        before = {node.id: node.facts.is_alive for node in self._nodes}
        for node in nodes:
            facts = node.facts
            if facts.is_alive and not before.get(node.id):
                self._events.add("node.joined", f"{facts.gpus:g} GPUs {facts.gpu_name}".strip(), node=facts.name)
            elif not facts.is_alive and before.get(node.id):
                self._events.add("node.lost", "Ray calls it dead", node=facts.name)
        self._nodes = nodes

    def _note_worker(self, before: Known | None, after: Known) -> None:
        if before is None or before.seen.presence is not after.seen.presence:
            seen = after.seen
            self._events.add(f"worker.{seen.presence}", seen.detail or "seen", node=seen.node, worker_id=seen.id)
