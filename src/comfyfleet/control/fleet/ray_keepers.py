"""A keeper on each machine that has something to do: asked at every look, and let go when its machine has nothing.

An actor makes its machine busy in Ray's books, and Ray's autoscaler ends idle machines only. So a keeper stays where
GPUs are given out or a worker runs, and a moment longer; of the other machines it is remembered what they told, which
nobody can change without giving a GPU out or asking here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import ray

from comfyfleet.clock import Clock
from comfyfleet.control.fleet.base import Presence
from comfyfleet.control.fleet.ray_node import NodeWorker
from comfyfleet.control.fleet.ray_view import Placed

ASK_S = 1.5
# Shorter than Ray's idle timeout, longer than what a worker that is restarted leaves its machine empty.
KEPT_S = 5.0
# What starts on a machine has its processor to itself first: a keeper takes a second or two of it.
BACK_AFTER_S = 4.0


class _Keeper:
    """A machine's keeper: what it told last, and the question it has not answered yet. handle None: there is none."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.question: Any = None
        self.workers: dict[int, NodeWorker] = {}
        self.is_heard = False
        self.is_silent = False  # the last time it was asked
        self.is_new = True  # this handle has not answered yet
        self.calls = 0
        self.needed_at = 0.0
        self.gone_since = float("inf")  # it was let go, and is needed again since then


class Keepers:
    """By machine. make: the keeper's handle, of the one that is there or of a new one."""

    def __init__(self, make: Callable[[str], Any], clock: Clock) -> None:
        self._make = make
        self._clock = clock
        self._of: dict[str, _Keeper] = {}
        self._counting = threading.Lock()

    def ask(self, machines: Collection[str], busy: Collection[str]) -> None:
        """What workers each machine has, as soon as it answers. busy: those where Ray gave something out."""
        self._of = {number: self._of.get(number) or _Keeper() for number in machines}
        now = self._clock.monotonic()
        for number, keeper in self._of.items():
            if number in busy or keeper.calls or not keeper.is_heard or _runs_something(keeper):
                keeper.needed_at = now
            if now - keeper.needed_at >= KEPT_S:
                self._let_go(keeper)
                continue
            keeper.gone_since = min(keeper.gone_since, now)
            if keeper.handle is None and (not keeper.is_heard or now - keeper.gone_since >= BACK_AFTER_S):
                keeper.handle, keeper.is_new = self._make(number), True
            if keeper.handle is not None:
                keeper.question = keeper.question or keeper.handle.workers.remote()
        self._hear()

    def _hear(self) -> None:
        asked = [(keeper, question) for keeper in self._of.values() if (question := keeper.question) is not None]
        if not asked:
            return
        # One that starts anew takes a second or two; what its machine has is known meanwhile, so nobody waits for it.
        awaited = [question for keeper, question in asked if not (keeper.is_new and keeper.is_heard)]
        if awaited:
            ray.wait(awaited, num_returns=len(awaited), timeout=ASK_S)
        ready, _ = ray.wait([question for _, question in asked], num_returns=len(asked), timeout=0)
        for keeper, question in asked:
            if keeper.question is not question:
                continue  # something was done there meanwhile: the answer is outdated
            keeper.is_silent = question not in ready
            if keeper.is_silent:
                continue
            keeper.question = None
            try:
                told = ray.get(question, timeout=ASK_S)
            except ray.exceptions.RayError:
                keeper.handle, keeper.is_silent = None, True  # it died; the next look makes another
            else:
                keeper.workers = {worker.seen.id: worker for worker in told}
                keeper.is_heard, keeper.is_new = True, False

    def _let_go(self, keeper: _Keeper) -> None:
        handle, keeper.handle, keeper.question, keeper.is_silent = keeper.handle, None, None, False
        keeper.gone_since = float("inf")
        if handle is None:
            return
        with suppress(ray.exceptions.RayError):
            ray.kill(handle)

    def call(self, machine: str, method: str, *arguments: object, limit_s: float) -> Any:
        """Do something there, through a new keeper where the one before was let go or died; then ask it anew."""
        keeper = self._of[machine]
        self._count(keeper, 1)
        try:
            keeper.handle = keeper.handle or self._make(machine)
            try:
                return ray.get(getattr(keeper.handle, method).remote(*arguments), timeout=limit_s)
            except ray.exceptions.ActorDiedError:  # let go by another control plane
                keeper.handle = self._make(machine)
                return ray.get(getattr(keeper.handle, method).remote(*arguments), timeout=limit_s)
        finally:
            keeper.question = None  # asked before it was done
            self._count(keeper, -1)

    def _count(self, keeper: _Keeper, step: int) -> None:
        with self._counting:
            keeper.calls += step

    def noted(self, machine: str, worker: NodeWorker) -> None:
        """It was just started there."""
        if (keeper := self._of.get(machine)) is not None:
            keeper.workers[worker.seen.id] = worker
            keeper.question = None  # asked before this worker was there

    def forget(self, machine: str) -> None:
        self._of.pop(machine, None)

    def is_heard(self, machine: str) -> bool:
        return machine in self._of and self._of[machine].is_heard

    def is_silent(self, machine: str) -> bool:
        return machine in self._of and self._of[machine].is_silent

    def placed(self) -> tuple[Placed, ...]:
        """Every worker with a folder somewhere."""
        return tuple(
            Placed(node_id=number, worker=worker)
            for number, keeper in list(self._of.items())
            for worker in keeper.workers.values()
        )

    def holders(self, worker_id: int) -> Sequence[Placed]:
        """Where its folder is, the machine where it runs first."""
        found = [one for one in self.placed() if one.worker.seen.id == worker_id]
        return sorted(found, key=lambda one: one.worker.seen.presence is not Presence.RUNNING)


def _runs_something(keeper: _Keeper) -> bool:
    return any(worker.seen.presence is Presence.RUNNING for worker in keeper.workers.values())
