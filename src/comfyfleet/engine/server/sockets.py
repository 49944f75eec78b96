"""Who listens: WebSocket clients by id, each with an outbox of its own, so a slow reader delays nobody but itself.

An outbox that grows too large drops its previews first, then all but the newest state of each kind that is repeated
in full anyway; a client that still does not read is closed, with a reason.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping
from typing import Any

import anyio
import msgspec

MAX_OUTBOX_BYTES = 64 << 20
EVENT_PREVIEW, EVENT_PREVIEW_WITH_METADATA = 1, 4
IMAGE_TYPES = {"image/jpeg": 1, "image/png": 2}
PREVIEWS_WITH_METADATA = "supports_preview_metadata"
TOO_SLOW = 1013  # WebSocket close code: try again later

encode = msgspec.json.Encoder().encode


class Outbox:
    """Frames that wait for one socket. `take` waits for the next; None means: close, the reader is too slow."""

    def __init__(self, limit_bytes: int = MAX_OUTBOX_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._frames: deque[tuple[str, str | bytes]] = deque()
        self._bytes = 0
        self._filled = anyio.Event()
        self.is_overrun = False
        self.features: Mapping[str, Any] = {}

    def put(self, kind: str, frame: str | bytes) -> None:
        """`kind` is the message type, "preview" for pictures."""
        if self.is_overrun:
            return
        self._frames.append((kind, frame))
        self._bytes += len(frame)
        if self._bytes > self._limit_bytes:
            self._thin_out()
        self._filled.set()

    def _thin_out(self) -> None:
        newest_state = max((i for i, (kind, _) in enumerate(self._frames) if kind == "progress_state"), default=-1)
        kept = [
            (kind, frame)
            for i, (kind, frame) in enumerate(self._frames)
            if kind != "preview" and (kind != "progress_state" or i == newest_state)
        ]
        self._frames = deque(kept)
        self._bytes = sum(len(frame) for _, frame in kept)
        if self._bytes > self._limit_bytes:
            self._frames.clear()
            self.is_overrun = True

    async def take(self) -> str | bytes | None:
        while not self._frames:
            if self.is_overrun:
                return None
            self._filled = anyio.Event()
            await self._filled.wait()
        _, frame = self._frames.popleft()
        self._bytes -= len(frame)
        return frame


class Hub:
    """All open sockets. The newest socket of a client id gets its messages."""

    def __init__(self) -> None:
        self._outboxes: dict[str, Outbox] = {}

    def join(self, client_id: str, outbox: Outbox) -> None:
        self._outboxes[client_id] = outbox

    def leave(self, client_id: str, outbox: Outbox) -> None:
        """An older socket of the same id takes nothing away from the newer one."""
        if self._outboxes.get(client_id) is outbox:
            del self._outboxes[client_id]

    def is_listening(self, client_id: str | None) -> bool:
        """True when somebody would see a prompt's previews."""
        return client_id in self._outboxes if client_id is not None else bool(self._outboxes)

    def send(self, kind: str, data: Mapping[str, Any], client_id: str | None = None) -> None:
        """To one client, or to everyone when there is no id."""
        self.send_text(kind, message(kind, data), client_id)

    def send_text(self, kind: str, text: str, client_id: str | None) -> None:
        for outbox in self._receivers(client_id):
            outbox.put(kind, text)

    def send_preview(self, image: bytes, media_type: str, metadata: Mapping[str, Any], client_id: str | None) -> None:
        """A picture, with metadata for those who said they can read it."""
        for outbox in self._receivers(client_id):
            if outbox.features.get(PREVIEWS_WITH_METADATA):
                described = encode({**metadata, "image_type": media_type})
                head = struct.pack(">II", EVENT_PREVIEW_WITH_METADATA, len(described)) + described
            else:
                head = struct.pack(">II", EVENT_PREVIEW, IMAGE_TYPES[media_type])
            outbox.put("preview", head + image)

    def _receivers(self, client_id: str | None) -> list[Outbox]:
        if client_id is None:
            return list(self._outboxes.values())
        outbox = self._outboxes.get(client_id)
        return [outbox] if outbox is not None else []


def message(kind: str, data: Mapping[str, Any]) -> str:
    return encode({"type": kind, "data": data}).decode()
