"""What was measured before: seconds per workflow shape and per kind of node, on this worker.

From it come the ETA, the queue estimate, weights of progress, and how long a silent node may be silent. A shape is a
digest of what costs time (`wire.shapes`). Kept in the journal, so a restart forgets nothing.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

MAX_SHAPES = 512
MAX_NODES = 2048
# A node never seen before may be silent this long before anybody thinks of a dead worker thread.
UNKNOWN_NODE_LIMIT_S = 1800.0
NODE_LIMIT_FLOOR_S = 60.0
NODE_LIMIT_FACTOR = 3.0
_NEWEST_SHARE = 0.3  # of a new measurement in the running mean


class Learned(msgspec.Struct, kw_only=True):
    """One running mean and the longest seen, in seconds."""

    mean_s: float
    longest_s: float
    count: int = 1

    def add(self, seconds: float) -> None:
        share = max(_NEWEST_SHARE, 1.0 / (self.count + 1))
        self.mean_s += (seconds - self.mean_s) * share
        self.longest_s = max(self.longest_s * 0.999, seconds)
        self.count += 1


class Durations:
    """Bounded: the shapes and nodes used least recently are forgotten."""

    def __init__(self) -> None:
        self._shapes: OrderedDict[str, Learned] = OrderedDict()
        self._nodes: OrderedDict[str, Learned] = OrderedDict()

    def learn_run(self, shape: str, seconds: float) -> None:
        _learn(self._shapes, shape, seconds, MAX_SHAPES)

    def learn_node(self, class_type: str, seconds: float) -> None:
        _learn(self._nodes, class_type, seconds, MAX_NODES)

    def run_s(self, shape: str) -> float | None:
        """The expected seconds of a run: of this shape, else the mean of all shapes, else None."""
        found = self._shapes.get(shape)
        if found is not None:
            return found.mean_s
        if not self._shapes:
            return None
        return sum(one.mean_s for one in self._shapes.values()) / len(self._shapes)

    def node_s(self, class_type: str) -> float | None:
        found = self._nodes.get(class_type)
        return found.mean_s if found else None

    def silence_limit_s(self, class_type: str) -> float:
        """How long this node may say nothing: three times its longest, at least a minute."""
        found = self._nodes.get(class_type)
        if found is None:
            return UNKNOWN_NODE_LIMIT_S
        return max(NODE_LIMIT_FLOOR_S, NODE_LIMIT_FACTOR * found.longest_s)

    def run_limit_s(self, shape: str) -> float:
        """How long a whole run of this shape may take when none of its events is heard."""
        found = self._shapes.get(shape)
        if found is None:
            return UNKNOWN_NODE_LIMIT_S
        return max(NODE_LIMIT_FLOOR_S, NODE_LIMIT_FACTOR * found.longest_s)

    def dump(self) -> bytes:
        return msgspec.json.encode({"shapes": self._shapes, "nodes": self._nodes})

    def load(self, data: bytes) -> None:
        found = msgspec.json.decode(data, type=dict[str, dict[str, Learned]])
        self._shapes.update(found.get("shapes", {}))
        self._nodes.update(found.get("nodes", {}))


def _learn(known: OrderedDict[str, Learned], name: str, seconds: float, limit: int) -> None:
    found = known.get(name)
    if found is None:
        known[name] = Learned(mean_s=seconds, longest_s=seconds)
        if len(known) > limit:
            known.popitem(last=False)
    else:
        found.add(seconds)
        known.move_to_end(name)
