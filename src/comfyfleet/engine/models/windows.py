"""Run a convolution stack over a long axis in pieces, with the same result as in one piece.

Each piece is read with as many neighbours on either side as the stack can see (its reach) and their results are cut
off again; at the true ends the stack pads as it always does. So memory stays flat while the length grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor


def in_windows(
    stack: Callable[[Tensor], Tensor], x: Tensor, *, window: int, reach: int, factor: int
) -> Iterator[Tensor]:
    """Yield `stack(x)` along the last axis, in order, `window` inputs at a time.

    reach: inputs on each side that can influence an output. factor: outputs per input (a whole number).
    """
    length = x.shape[-1]
    for start in range(0, length, window):
        end = min(start + window, length)
        left, right = min(reach, start), min(reach, length - end)
        piece = stack(x[..., start - left : end + right])
        yield piece[..., left * factor : (left + end - start) * factor]
