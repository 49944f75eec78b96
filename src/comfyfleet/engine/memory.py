"""Which models are on the device: within a byte budget, the least recently used one moves off first.

Knows nothing of what a model computes; anything with `size_bytes` and `move_to` can be resident. Weights that nobody
holds any more are forgotten by themselves. Two runs may share a device: a model that one computes with stays where it
is, and no model computes for both at once.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import psutil
import torch

from comfyfleet.engine.sharing import LOOK_S, CheckStop

OFFLOAD_DEVICE = "cpu"


class Movable(Protocol):
    size_bytes: int

    def move_to(self, device: str) -> None: ...


@runtime_checkable
class Compilable(Protocol):
    def compile_with(self, backend: str) -> None: ...


class Residency:
    """The models on one device. On a CPU nothing moves, and this only remembers what was used."""

    def __init__(self, device: str, budget_bytes: int, compile_backend: str | None = None) -> None:
        """compile_backend: networks that can be are compiled with it when they come."""
        self.device = device
        self._compile_backend = compile_backend
        self._budget_bytes = budget_bytes
        self._resident: dict[int, weakref.ref[Any]] = {}  # by identity, least recently used first
        self._files: dict[int, tuple[weakref.ref[Any], frozenset[str]]] = {}  # by identity
        self._changed = threading.Condition(threading.RLock())
        self._in_use: dict[int, Movable] = {}  # by identity

    @contextmanager
    def using(self, models: Sequence[Movable], check_stop: CheckStop) -> Iterator[None]:
        """Bring models to the device, and keep them there meanwhile.

        Waits while another run computes with one of them, or with so much that these do not fit beside it.
        """
        wanted = {id(model): model for model in models}
        with self._changed:
            while self._in_use and not self._fits_beside(wanted):
                self._changed.wait(LOOK_S)
                check_stop()
            self._in_use |= wanted
        try:
            with self._changed:
                for model in wanted.values():
                    self.use(model)
            yield
        finally:
            with self._changed:
                for key in wanted:
                    del self._in_use[key]
                self._changed.notify_all()

    def _fits_beside(self, wanted: dict[int, Movable]) -> bool:
        needed = sum(model.size_bytes for model in (*wanted.values(), *self._in_use.values()))
        return not wanted or (not wanted.keys() & self._in_use.keys() and needed <= self._budget_bytes)

    def use(self, model: Movable) -> None:
        """Bring a model to the device, making room for it first."""
        self._resident.pop(id(model), None)
        room = self._budget_bytes - model.size_bytes
        for key, other in self._living():
            if self.size_bytes <= room:
                break
            if key in self._in_use:
                continue
            other.move_to(OFFLOAD_DEVICE)
            del self._resident[key]
        model.move_to(self.device)
        if self._compile_backend is not None and isinstance(model, Compilable):
            model.compile_with(self._compile_backend)
        self._resident[id(model)] = weakref.ref(model)

    def came_from(self, model: Any, files: Iterable[str]) -> None:
        """A loader made this model of those files."""
        with self._changed:
            self._files = {key: known for key, known in self._files.items() if known[0]() is not None}
            self._files[id(model)] = (weakref.ref(model), frozenset(files))

    def files_of(self, model: Any) -> frozenset[str]:
        """Of a model that a loader made; empty for others."""
        known = self._files.get(id(model))
        return known[1] if known is not None and known[0]() is model else frozenset()

    def files(self) -> tuple[str, ...]:
        """Files with a model on the device, sorted."""
        with self._changed:
            return tuple(sorted({file for _, model in self._living() for file in self.files_of(model)}))

    @property
    def size_bytes(self) -> int:
        return sum(model.size_bytes for _, model in self._living())

    def release_all(self) -> None:
        """Move everything off the device but what is being computed with."""
        with self._changed:
            for key, model in self._living():
                if key not in self._in_use:
                    model.move_to(OFFLOAD_DEVICE)
                    del self._resident[key]
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _living(self) -> list[tuple[int, Any]]:
        living = [(key, reference()) for key, reference in self._resident.items()]
        for key, model in living:
            if model is None:
                del self._resident[key]
        return [(key, model) for key, model in living if model is not None]


def default_cache_bytes() -> int:
    """What results may take of the machine's memory when nobody said: a fifth of it."""
    return int(psutil.virtual_memory().total * 0.2)
