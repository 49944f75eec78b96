"""Long films piece by piece: made, and changed frame by frame, without memory that grows with their length.

A film over a limit is put into a file without a name as its pieces come. What comes out is an IMAGE like any other;
its pages are read when a node looks at a frame. Between two pieces a run can be stopped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from comfyfleet.engine.registry import NodeRun

IN_MEMORY_BYTES = 64 << 20  # a film of up to this stays in memory
PIECE_BYTES = 16 << 20  # of the frames that are changed at once


def changed(run: NodeRun, images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` of each frame: it gets some (n, H, W, C) at a time and treats each by itself."""
    frames = max(1, PIECE_BYTES // max(1, images[:1].nbytes))
    return join(until_stopped(run, map(change, images.split(frames))), run.folders.scratch_path)


def until_stopped(run: NodeRun, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    """The pieces, for as long as nobody stops the run: a film is stopped within one latent frame."""
    for piece in pieces:
        run.check_stop()
        yield piece


def join(pieces: Iterator[Tensor], scratch: Callable[[], str], in_memory_bytes: int = IN_MEMORY_BYTES) -> Tensor:
    """IMAGE batches in order to one; `scratch` names a file that nobody has, for more than `in_memory_bytes`."""
    waiting: list[Tensor] = []
    held_bytes = 0
    for piece in pieces:
        waiting.append(piece.detach().to("cpu", torch.float32))
        held_bytes += waiting[-1].nbytes
        if held_bytes > in_memory_bytes:
            return _joined_in_file(waiting, pieces, scratch())
    return waiting[0] if len(waiting) == 1 else torch.cat(waiting)


def _joined_in_file(waiting: list[Tensor], more: Iterator[Tensor], path: str) -> Tensor:
    """The pieces that wait, and those still to come, mapped from a file that goes with the tensor."""
    shape, count = waiting[0].shape[1:], 0
    waiting.reverse()
    try:
        with open(path, "wb") as file:
            while (piece := waiting.pop() if waiting else next(more, None)) is not None:
                file.write(piece.detach().to("cpu", torch.float32).contiguous().numpy().data)
                count += len(piece)
        return torch.from_file(path, shared=False, size=count * math.prod(shape)).view(count, *shape)
    finally:
        os.unlink(path)
