"""Results by signature, bounded in bytes, least recently used first out; kept across prompts.

Memory is shared: results that hold the same network, or the same frames as pictures and as a film, cost it once. A
result that shows files is only given back while those files are what they were.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any

from comfyfleet.engine.events import Ui

ENTRY_BYTES = 1024  # what remembering any result costs, so that small ones are bounded too


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileState:
    """A file as it was when written: if it differs later, what shows it is stale."""

    path: str
    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: str) -> FileState:
        status = os.stat(path)
        return cls(path=path, size_bytes=status.st_size, modified_ns=status.st_mtime_ns)

    def is_current(self) -> bool:
        try:
            return FileState.of(self.path) == self
        except OSError:
            return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a node gave: its outputs, and what it showed with the files it wrote for that."""

    outputs: tuple[Any, ...]
    ui: Ui | None = None
    files: tuple[FileState, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holding:
    """What a result keeps in memory. `shared` are storages and weights by name: other results may hold them too."""

    own_bytes: int
    shared: dict[str, int]
    has_weights: bool


class ResultCache:
    """Safe to use from several threads. `limit_bytes` bounds what is kept, not what one result may take."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._using = threading.RLock()
        self._results: OrderedDict[str, tuple[Result, Holding]] = OrderedDict()
        self._holders: Counter[str] = Counter()  # how many results hold the shared thing of this name
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._results)

    def get(self, signature: str | None) -> Result | None:
        """The result, counted as used; None when unknown, dropped, or its files have changed."""
        if signature is None:
            return None
        with self._using:
            entry = self._results.get(signature)
            if entry is None:
                return None
            if not all(file.is_current() for file in entry[0].files):
                self._drop(signature)
                return None
            self._results.move_to_end(signature)
            return entry[0]

    def put(self, signature: str | None, result: Result) -> None:
        if signature is None:
            return
        with self._using:
            self._put(signature, result, measure(result.outputs))

    def _put(self, signature: str, result: Result, holding: Holding) -> None:
        if signature in self._results:
            self._drop(signature)
        added = holding.own_bytes + sum(size for name, size in holding.shared.items() if name not in self._holders)
        if added > self._limit_bytes:
            return  # it would push everything else out and still not fit
        self._results[signature] = (result, holding)
        self._holders.update(holding.shared.keys())
        self.size_bytes += added
        while self.size_bytes > self._limit_bytes:
            self._drop(next(iter(self._results)))

    def clear(self) -> None:
        with self._using:
            self._results.clear()
            self._holders.clear()
            self.size_bytes = 0

    def drop_holding_weights(self) -> None:
        """Forget every result that holds a model, so its memory can go."""
        with self._using:
            for signature in [name for name, (_, holding) in self._results.items() if holding.has_weights]:
                self._drop(signature)

    def _drop(self, signature: str) -> None:
        _, holding = self._results.pop(signature)
        self.size_bytes -= holding.own_bytes
        for name, size in holding.shared.items():
            self._holders[name] -= 1
            if self._holders[name] == 0:
                del self._holders[name]
                self.size_bytes -= size


def measure(value: Any) -> Holding:
    """What a value holds: its texts, the storages of its tensors (a view holds the whole), its models' weights."""
    own_bytes, has_weights = ENTRY_BYTES, False
    shared: dict[str, int] = {}
    for part in _parts(value):
        if isinstance(part, (str, bytes)):
            own_bytes += len(part)
        elif hasattr(part, "untyped_storage"):
            storage = part.untyped_storage()
            shared[f"storage {storage.data_ptr()}"] = storage.nbytes()
        elif hasattr(part, "size_bytes"):
            shared[f"weights {getattr(part, 'key', id(part))}"] = int(part.size_bytes)
            has_weights = True
    return Holding(own_bytes=own_bytes, shared=shared, has_weights=has_weights)


_WEIGHTLESS = (int, float, type(None))


def _parts(value: Any) -> Iterator[Any]:
    stack = [value]
    while stack:
        current = stack.pop()
        if isinstance(current, _WEIGHTLESS):
            continue
        if isinstance(current, (tuple, list)):
            stack.extend(current)
        elif isinstance(current, dict):
            stack.extend(current.values())
        elif dataclasses.is_dataclass(current) and not isinstance(current, type) and not hasattr(current, "size_bytes"):
            stack.extend(getattr(current, field.name) for field in dataclasses.fields(current))
        else:
            yield current
