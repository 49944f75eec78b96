"""What the cluster shows, as values, and what it means for each worker. Pure; no Ray here.

A machine that Ray calls dead has lost its workers. One that Ray has not heard of has not: after the loss of a Ray head
its machines join the next one by and by, and their workers serve meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from comfyfleet.control.fleet.base import FleetNode, FleetWorker, Presence
from comfyfleet.control.fleet.needs import PRICE_FIELDS
from comfyfleet.control.fleet.ray_node import NodeWorker

RAM_RESOURCE = "gpu_ram_gb"


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A machine by Ray's books. is_heard: its keeper has told which workers it has. has_ram: it counts GPU memory."""

    id: str
    facts: FleetNode
    is_heard: bool = False
    has_ram: bool = False


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's folder on a machine."""

    node_id: str
    worker: NodeWorker


class Placing(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that is on its way to a machine, where it will hold `gpus`, or did not get there (`error`)."""

    id: int
    since: float
    gpus: float = 0.0
    error: str = ""


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """Everything at one time."""

    nodes: tuple[NodeView, ...] = ()
    placed: tuple[Placed, ...] = ()
    placing: tuple[Placing, ...] = ()


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as it was last seen: what is said of it while the cluster does not answer."""

    seen: FleetWorker
    node_id: str = ""
    incarnation: str = ""


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """leftovers: (machine's id, worker's id) of folders that a worker left when it was started elsewhere."""

    known: Mapping[int, Known]
    leftovers: tuple[tuple[str, int], ...] = ()


def node_view(raw: Mapping[str, object], free: Mapping[str, float], *, is_heard: bool) -> NodeView:
    """From a row of `ray.nodes()`. Labels name what Ray does not count: gpu_name, dph_total, gpu_ram."""
    resources: Mapping[str, float] = raw.get("Resources") or {}  # type: ignore[assignment]  # Ray's rows have no types
    labels: Mapping[str, str] = raw.get("Labels") or {}  # type: ignore[assignment]  # as above
    gpus = float(resources.get("GPU", 0.0))
    ram = resources.get(RAM_RESOURCE, 0.0) / gpus if gpus else 0.0
    number = str(raw["NodeID"])
    prices = [price for name in PRICE_FIELDS if (price := _number(labels.get(name)))]
    return NodeView(
        id=number,
        facts=FleetNode(
            name=labels.get("name") or f"{raw.get('NodeManagerHostname', 'node')}-{number[:6]}",
            address=str(raw.get("NodeManagerAddress", "")),
            is_alive=bool(raw.get("Alive")),
            gpus=gpus,
            free_gpus=float(free.get("GPU", 0.0)),
            gpu_name=labels.get("gpu_name") or labels.get("ray.io/accelerator-type") or "",
            gpu_ram_gb=ram or _number(labels.get("gpu_ram")),
            price_hour=prices[0] if prices else 0.0,
            labels={name: value for name, value in labels.items() if name != "ray.io/node-id"},
        ),
        is_heard=is_heard,
        has_ram=RAM_RESOURCE in resources,
    )


def present_nodes(nodes: Sequence[NodeView]) -> tuple[FleetNode, ...]:
    """Every machine once: Ray remembers a machine that came back as a dead one beside the one that lives."""
    alive = {node.facts.name for node in nodes if node.facts.is_alive}
    lost = {node.facts.name: node.facts for node in nodes if node.facts.name not in alive}
    return (*(node.facts for node in nodes if node.facts.is_alive), *lost.values())


def findings(look: Look, known: Mapping[int, Known]) -> Findings:
    """Every worker there is, by what is seen now and what was known before."""
    nodes = {node.id: node for node in look.nodes}
    folders: dict[int, list[Placed]] = {}
    for placed in look.placed:
        folders.setdefault(placed.worker.seen.id, []).append(placed)
    placing = {one.id: one for one in look.placing}
    found: dict[int, Known] = {}
    leftovers: list[tuple[str, int]] = []
    for number in sorted({*folders, *known, *placing}):
        before = known.get(number)
        chosen = _present(folders.get(number, []), before)
        for other in folders.get(number, []):
            is_running = other.worker.seen.presence is Presence.RUNNING
            if chosen is not None and other is not chosen and not is_running and number not in placing:
                leftovers.append((other.node_id, number))
        if (coming := placing.get(number)) is not None:
            found[number] = _coming(coming, before)
        elif chosen is not None:
            found[number] = _there(chosen, nodes.get(chosen.node_id))
        elif before is not None:
            found[number] = _unseen(before, nodes.get(before.node_id))
    return Findings(known=found, leftovers=tuple(leftovers))


def _present(folders: Sequence[Placed], before: Known | None) -> Placed | None:
    """Of several folders of one worker: its present life's, else the one that runs, else the newest."""
    if not folders:
        return None
    return max(
        folders,
        key=lambda one: (
            before is not None and one.worker.reservation.incarnation == before.incarnation,
            one.worker.seen.presence is Presence.RUNNING,
            one.worker.seen.started_at,
        ),
    )


def _coming(placing: Placing, before: Known | None) -> Known:
    if placing.error:
        seen = FleetWorker(id=placing.id, presence=Presence.LOST, started_at=placing.since, detail=placing.error)
    else:
        seen = FleetWorker(
            id=placing.id, presence=Presence.RUNNING, started_at=placing.since, detail="Ray is placing it"
        )
    return Known(seen=seen, incarnation=before.incarnation if before is not None else "")


def _there(placed: Placed, node: NodeView | None) -> Known:
    seen = placed.worker.seen
    if node is not None:
        facts, share = node.facts, placed.worker.reservation.num_gpus / (node.facts.gpus or 1.0)
        seen = msgspec.structs.replace(
            seen,
            node=facts.name,
            address=facts.address,
            gpu_name=facts.gpu_name,
            price_hour=facts.price_hour * share,
        )
    return Known(seen=seen, node_id=placed.node_id, incarnation=placed.worker.reservation.incarnation)


def _unseen(before: Known, node: NodeView | None) -> Known:
    """Known before, not found now."""
    if before.seen.presence is not Presence.RUNNING or not before.node_id:
        return before
    if node is None or (node.facts.is_alive and not node.is_heard):
        detail = "its machine has not joined this Ray cluster yet"
        return msgspec.structs.replace(before, seen=msgspec.structs.replace(before.seen, detail=detail))
    why = f"{node.facts.name} left the Ray cluster" if not node.facts.is_alive else "its folder is gone"
    lost = msgspec.structs.replace(before.seen, presence=Presence.LOST, detail=why)
    return msgspec.structs.replace(before, seen=lost)


def _number(text: str | None) -> float:
    try:
        return float(text) if text else 0.0
    except ValueError:
        return 0.0
