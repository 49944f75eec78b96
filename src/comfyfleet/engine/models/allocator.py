"""Keep the C library from giving big blocks back to the system between equal allocations.

glibc maps blocks above a threshold freshly each time, and every fresh page costs a fault; a decoder that allocates the
same hundred megabytes over and over spends more time there than computing (measured: 21 s became 12 s). Inside
`big_blocks_kept` blocks come from the heap; at its end the defaults return and free pages go back to the system.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # mallopt(3)
DEFAULT_TRIM_BYTES, DEFAULT_MMAP_BLOCKS = 128 * 1024, 65536


@contextlib.contextmanager
def big_blocks_kept() -> Iterator[None]:
    """For the time of a decode. Does nothing where the C library is not glibc."""
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(MMAP_MAX, 0)
    library.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        library.mallopt(MMAP_MAX, DEFAULT_MMAP_BLOCKS)
        library.mallopt(TRIM_THRESHOLD, DEFAULT_TRIM_BYTES)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
