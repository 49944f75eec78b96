"""Results by signature, bounded in bytes, least recently used first out; kept across prompts.

Weights are shared: two results that hold the same network (one patched, one not) cost its bytes once. A result that
shows files is only given back while those files are what they were.
"""

from __future__ import annotations

import dataclasses
import os
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


class ResultCache:
    """Use from one thread. `limit_bytes` bounds what is kept, not what one result may take."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._results: OrderedDict[str, tuple[Result, int, tuple[tuple[str, int], ...]]] = OrderedDict()
        self._holders: Counter[str] = Counter()  # how many results hold the weights of this key
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._results)

    def get(self, signature: str | None) -> Result | None:
        """The result, counted as used; None when unknown, dropped, or its files have changed."""
        if signature is None:
            return None
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
        if signature in self._results:
            self._drop(signature)
        own_bytes, weights = measure(result.outputs)
        own_bytes += ENTRY_BYTES
        if own_bytes + sum(size for key, size in weights if key not in self._holders) > self._limit_bytes:
            return  # it would push everything else out and still not fit
        self._results[signature] = (result, own_bytes, weights)
        self.size_bytes += own_bytes
        for key, weight_bytes in weights:
            self._holders[key] += 1
            if self._holders[key] == 1:
                self.size_bytes += weight_bytes
        while self.size_bytes > self._limit_bytes:
            self._drop(next(iter(self._results)))

    def clear(self) -> None:
        self._results.clear()
        self._holders.clear()
        self.size_bytes = 0

    def drop_holding_weights(self) -> None:
        """Forget every result that holds a model, so its memory can go."""
        for signature in [name for name, (_, _, weights) in self._results.items() if weights]:
            self._drop(signature)

    def _drop(self, signature: str) -> None:
        _, own_bytes, weights = self._results.pop(signature)
        self.size_bytes -= own_bytes
        for key, weight_bytes in weights:
            self._holders[key] -= 1
            if self._holders[key] == 0:
                del self._holders[key]
                self.size_bytes -= weight_bytes


def measure(value: Any) -> tuple[int, tuple[tuple[str, int], ...]]:
    """(bytes of tensors and texts, ((key, bytes) of each set of weights)) held by a value."""
    own_bytes = 0
    weights: dict[str, int] = {}
    for part in _parts(value):
        if isinstance(part, str | bytes):
            own_bytes += len(part)
        elif hasattr(part, "element_size"):
            own_bytes += part.element_size() * part.nelement()
        elif hasattr(part, "size_bytes"):
            weights[str(getattr(part, "key", id(part)))] = int(part.size_bytes)
    return own_bytes, tuple(weights.items())


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
