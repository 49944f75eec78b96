"""How much room a fleet wants of the cluster: what its workers hold, and what was refused lately. Pure.

Ray's autoscaler is told a whole wish, not a difference, and packs it onto empty machines; so what is held is wished for
where it is. A worker that is inactive wishes for nothing: it waits, packed with others, on machines that active ones
keep; when none does, its machine may go and it starts anew elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from comfyfleet.control.fleet.base import FleetNode, Presence, WorkerSpec
from comfyfleet.control.fleet.needs import PRICE_FIELDS, is_fit
from comfyfleet.control.fleet.ray_view import RAM_RESOURCE, Placed

# A refusal is a wish until it is tried again (the reconciler pauses 15 s after one), and a little longer.
REFUSED_KEPT_S = 40.0
SAME_ROUND_S = 8.0
REPEAT_S = 10.0
# Fields of a search that are labels of a machine and that its GPU's kind or place is told by.
LABELS = ("gpu_name", "region", "pool")
NODE_LABEL = "ray.io/node-id"


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """Room for one worker: Ray's resources, and what labels the machine must have, in the words of Ray's selectors."""

    bundle: Mapping[str, float]
    labels: Mapping[str, str] = {}


def wish(spec: WorkerSpec, nodes: Iterable[FleetNode] = ()) -> Wish:
    """What a worker needs. nodes: those ever seen, whose labels tell how others spell a name, and what is too dear."""
    seen = [node for node in nodes if node.gpus]
    labels = {}
    for name in LABELS:
        if names := _names(spec.search.get(name, {})):
            fit = {node.labels[name] for node in seen if name in node.labels and _fits(spec, name, node)}
            labels[name] = _one_of(names | fit)
    # Ray's selectors know no "at most": prices that were seen and are too high are named instead.
    for name in PRICE_FIELDS:
        if name in spec.search:
            dear = {node.labels[name] for node in seen if name in node.labels and not _fits(spec, name, node)}
            labels |= {name: f"!in({','.join(sorted(dear))})"} if dear else {}
    return Wish(bundle=_bundle(spec.num_gpus, spec.gpu_ram_gb), labels=labels)


def _names(clauses: Mapping[str, Any]) -> set[str]:
    """What a field may be, as labels spell it (no spaces); none where the search says it otherwise, or not."""
    options = [str(option) for option in ([clauses["eq"]] if "eq" in clauses else clauses.get("in", ()))]
    spelled = {option.replace(" ", between) for option in options for between in "_-"}
    return spelled | {one.upper() for one in spelled}


def _fits(spec: WorkerSpec, name: str, node: FleetNode) -> bool:
    return is_fit({name: spec.search[name]}, node)


def _one_of(values: Collection[str]) -> str:
    return f"in({','.join(sorted(values))})" if len(values) > 1 else next(iter(values))


def held_by(placed: Placed) -> Wish:
    """Room for a worker that has its place: on that machine and no other."""
    kept = placed.worker.reservation
    return Wish(bundle=_bundle(kept.num_gpus, kept.gpu_ram_gb), labels={NODE_LABEL: placed.node_id})


def _bundle(num_gpus: float, gpu_ram_gb: float) -> Mapping[str, float]:
    return {"GPU": num_gpus, **({RAM_RESOURCE: gpu_ram_gb * num_gpus} if gpu_ram_gb else {})}


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """All that one control plane wishes for: what workers hold, by their id, and what was refused."""

    held: Mapping[int, Wish] = {}
    refused: tuple[Wish, ...] = ()


class Demand:
    """Remembers; `news` is what to tell Ray, None when it knows."""

    def __init__(self) -> None:
        self._coming: dict[int, Wish] = {}
        self._held: dict[int, Wish] = {}
        self._refused: dict[int, tuple[float, Wish]] = {}
        self._told = Told()
        self._told_at = float("-inf")

    def placed(self, spec: WorkerSpec, wished: Wish) -> None:
        """It is on its way; `holds` will see it."""
        self._coming[spec.id] = wished
        mine = next((number for number, (_, one) in self._refused.items() if one == wished), None)
        if mine is not None:
            del self._refused[mine]

    def holds(self, placed: Sequence[Placed]) -> None:
        """Where workers are, whoever placed them: a control plane that begins knows of none it placed itself."""
        self._held = {
            one.worker.seen.id: held_by(one)
            for one in placed
            if one.worker.seen.presence in (Presence.RUNNING, Presence.EXITED)
        }
        self._coming = {number: one for number, one in self._coming.items() if number not in self._held}

    def ended(self, worker_id: int) -> None:
        self._coming.pop(worker_id, None)
        self._held.pop(worker_id, None)

    def refused(self, spec: WorkerSpec, wished: Wish, now: float) -> None:
        """There was no room for this one. A new round of trying replaces the one before."""
        if any(now - at > SAME_ROUND_S for at, _ in self._refused.values()):
            self._refused.clear()
        self._refused[spec.id] = (now, wished)

    def news(self, now: float) -> Told | None:
        """Everything wished for, when Ray has not been told of it, or not for a while."""
        self._refused = {number: one for number, one in self._refused.items() if now - one[0] < REFUSED_KEPT_S}
        told = Told(held={**self._coming, **self._held}, refused=tuple(one for _, one in self._refused.values()))
        is_old = told != Told() and now - self._told_at > REPEAT_S
        return told if told != self._told or is_old else None

    def told(self, told: Told, now: float) -> None:
        self._told, self._told_at = told, now


class Portion:
    """How much to ask for at once: Ray's second autoscaler starts nothing for a request that it cannot meet as a whole.

    Half as much when it was not met, one more each time it was; and turned, so that a wish that no machine can ever
    meet (a name of a GPU misspelled, a cluster at its greatest) does not stand before the others for good.
    """

    def __init__(self) -> None:
        self._limit: int | None = None
        self._turn = 0
        self._asked = 0

    def of(self, wishes: Sequence[Wish], *, is_unmet: bool) -> Sequence[Wish]:
        """is_unmet: the last answer could not be met as a whole."""
        if is_unmet and self._asked:
            self._limit, self._turn = max(1, self._asked // 2), self._turn + 1
        elif self._limit is not None:
            self._limit += 1
        if self._limit is not None and self._limit >= len(wishes):
            self._limit = None
        first = self._turn % len(wishes) if wishes else 0
        chosen = [*wishes[first:], *wishes[:first]][: self._limit]
        self._asked = len(chosen)
        return chosen
