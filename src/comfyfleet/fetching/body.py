"""A response body, decoded within bounds: a small body that unpacks to a huge one is cut off, not unpacked.

Only gzip and deflate are spoken, though we ask for neither: some servers compress whatever one asks.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from comfyfleet.wire.errors import InputRefused, InputUnavailable

_PIECE = 256 * 1024


class Decoder:
    """Undo a Content-Encoding piece by piece, never holding more than a piece of what comes out."""

    def __init__(self, content_encoding: str) -> None:
        coding = content_encoding.strip().lower()
        self._inflate: zlib._Decompress | None
        if coding in ("", "identity"):
            self._inflate = None
        elif coding in ("gzip", "x-gzip"):
            self._inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        elif coding == "deflate":
            self._inflate = zlib.decompressobj()
        else:
            raise InputRefused(f"content encoding {coding[:40]!r} is not spoken here", reason="content_encoding")

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What `data` decodes to, in pieces of at most 256 KiB. Raises InputRefused for a corrupt stream."""
        if self._inflate is None:
            yield data
            return
        try:
            while data:
                out = self._inflate.decompress(data, _PIECE)
                if out:
                    yield out
                if self._inflate.eof:
                    return
                data = self._inflate.unconsumed_tail
        except zlib.error as problem:
            raise InputRefused("the body is not what its content encoding says", reason="content_encoding") from problem

    def finish(self) -> None:
        """The body is over. Raises InputUnavailable for a compressed stream that is not."""
        if self._inflate is not None and not self._inflate.eof:
            raise InputUnavailable("the file broke off", reason="connection")
