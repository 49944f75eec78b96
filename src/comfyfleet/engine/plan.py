"""Which nodes run, and in what order: ComfyUI's, so that progress looks the same to a client that watches both.

Pure. Nodes with known results are not walked through. Of the nodes that are ready, an output goes first, then one
whose result an output waits for, then one that is two links away from an output, then the one found first.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence


class Plan:
    """The nodes still to run for some outputs; `sources` are the nodes each one takes from, in the order of its inputs.

    Take `next_node`, then say `finish`.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[str]],
        outputs: Iterable[str],
        *,
        is_output: Mapping[str, bool],
        known: Collection[str],
    ) -> None:
        self._is_output = is_output
        self._users: dict[str, dict[str, None]] = {}
        self._waits_for: dict[str, int] = {}
        for output in outputs:
            self._walk(sources, output, known)
        self._position = {node_id: position for position, node_id in enumerate(self._waits_for)}
        self._ready: list[tuple[int, int, str]] = []
        for node_id, count in self._waits_for.items():
            if count == 0:
                self._make_ready(node_id)

    def _walk(self, sources: Mapping[str, Sequence[str]], start: str, known: Collection[str]) -> None:
        stack = [start]
        links: dict[tuple[str, str], None] = {}
        while stack:
            node_id = stack.pop()
            if node_id in self._waits_for:
                continue
            self._waits_for[node_id] = 0
            self._users[node_id] = {}
            if node_id in known:
                continue
            for source in sources[node_id]:
                if source not in known:
                    stack.append(source)
                    links[source, node_id] = None
        for source, user in links:
            if user not in self._users[source]:
                self._users[source][user] = None
                self._waits_for[user] += 1

    def __len__(self) -> int:
        return len(self._waits_for)

    def __iter__(self) -> Iterator[str]:
        """The nodes that this plan visits, as they were found."""
        return iter(self._waits_for)

    def next_node(self) -> str | None:
        """The node to run now, or None when nothing is left."""
        return self._ready[0][2] if self._ready else None

    def finish(self, node_id: str) -> None:
        """The node that `next_node` named has its result."""
        ready = heapq.heappop(self._ready)
        assert ready[2] == node_id, "nodes finish in the order in which they were given out"  # noqa: S101
        for user in self._users[node_id]:
            self._waits_for[user] -= 1
            if self._waits_for[user] == 0:
                self._make_ready(user)

    def _make_ready(self, node_id: str) -> None:
        heapq.heappush(self._ready, (self._links_to_output(node_id), self._position[node_id], node_id))

    def _links_to_output(self, node_id: str) -> int:
        # Whoever uses a node runs after it, so this does not change while the node waits.
        if self._is_output.get(node_id):
            return 0
        if any(self._is_output.get(user) for user in self._users[node_id]):
            return 1
        if any(self._is_output.get(second) for user in self._users[node_id] for second in self._users[user]):
            return 2
        return 3
