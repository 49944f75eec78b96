"""How much room this control plane wants of the cluster: what its workers hold, and what was refused lately. Pure.

Ray's autoscaler is told a whole wish, not a difference. A worker that is inactive wishes for nothing: it waits, packed
with others, on machines that active ones keep; when none does, its machine may go and it starts anew elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from comfyfleet.control.fleet.base import WorkerSpec
from comfyfleet.control.fleet.ray_view import RAM_RESOURCE

# A refusal is a wish until it is tried again (the reconciler pauses 15 s after one), and a little longer.
REFUSED_KEPT_S = 40.0
SAME_ROUND_S = 8.0
REPEAT_S = 30.0
# Ray's label selectors know equality only; these fields of a search are labels of a machine.
LABELS = ("gpu_name", "region", "pool")


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """Room for one worker: Ray's resources, and labels the machine must have."""

    bundle: Mapping[str, float]
    labels: Mapping[str, str] = {}


def wish(spec: WorkerSpec) -> Wish:
    """What a worker needs, in Ray's words."""
    bundle = {"GPU": spec.num_gpus}
    if spec.gpu_ram_gb:
        bundle[RAM_RESOURCE] = spec.gpu_ram_gb * spec.num_gpus
    labels = {
        name: str(clauses["eq"]).replace(" ", "_")
        for name in LABELS
        if (clauses := spec.search.get(name)) and "eq" in clauses
    }
    return Wish(bundle=bundle, labels=labels)


class Demand:
    """Remembers; `news` is what to tell Ray, None when it knows."""

    def __init__(self) -> None:
        self._held: dict[int, Wish] = {}
        self._refused: list[tuple[float, Wish]] = []
        self._told: tuple[Wish, ...] = ()
        self._told_at = float("-inf")
        self._news: tuple[Wish, ...] = ()

    def placed(self, spec: WorkerSpec) -> None:
        self._held[spec.id] = wish(spec)
        mine = next((one for one in self._refused if one[1] == wish(spec)), None)
        if mine is not None:
            self._refused.remove(mine)

    def ended(self, worker_id: int) -> None:
        self._held.pop(worker_id, None)

    def refused(self, spec: WorkerSpec, now: float) -> None:
        """There was no room for this one. A new round of trying replaces the one before."""
        if any(now - at > SAME_ROUND_S for at, _ in self._refused):
            self._refused.clear()
        self._refused.append((now, wish(spec)))

    def news(self, now: float) -> tuple[Wish, ...] | None:
        """Everything wished for, when Ray has not been told of it, or not for a while."""
        self._refused = [one for one in self._refused if now - one[0] < REFUSED_KEPT_S]
        self._news = (*self._held.values(), *(one for _, one in self._refused))
        is_old = bool(self._news) and now - self._told_at > REPEAT_S
        return self._news if self._news != self._told or is_old else None

    def told(self, now: float) -> None:
        self._told, self._told_at = self._news, now
