"""A file server that misbehaves on demand, for downloads: ranges, cuts, drips, refusals, redirects. It keeps a log."""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from support.crowd_server import CrowdServer


@dataclass
class Hosted:
    """One file and how it is served. refusals: answered in turn before anything else. cut_after: bytes, then gone."""

    content: bytes
    etag: str = '"v1"'
    has_ranges: bool = True
    is_chunked: bool = False
    refusals: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    cut_after: list[int] = field(default_factory=list)
    bytes_per_s: float = 0.0
    redirect_to: str = ""
    redirect_headers: dict[str, str] = field(default_factory=dict)  # what the hub says of the file it leads to
    content_type: str = "application/octet-stream"
    encoding: str = ""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass
class Asked:
    method: str
    path: str
    start: int
    end: int
    headers: dict[str, str]
    sent: int = 0


class ModelServer:
    """`with model_server() as server`; add to `files`."""

    def __init__(self) -> None:
        self.files: dict[str, Hosted] = {}
        self.log: list[Asked] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                outer.answer(self, with_body=False)

            def do_GET(self) -> None:
                outer.answer(self, with_body=True)

        self._server = CrowdServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, path: str, hosted: Hosted) -> str:
        self.files[path] = hosted
        return self.base + path

    def sent(self, path: str) -> int:
        return sum(asked.sent for asked in self.log if asked.path == path)

    def answer(self, handler: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        path = handler.path.partition("?")[0]
        hosted = self.files.get(path)
        asked = Asked(handler.command, path, 0, 0, dict(handler.headers))
        with self._lock:
            self.log.append(asked)
            refusal = hosted.refusals.pop(0) if hosted is not None and with_body and hosted.refusals else None
        if hosted is None or refusal is not None:
            status, headers = refusal or (404, {})
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if hosted.redirect_to:
            handler.send_response(302)
            handler.send_header("Location", hosted.redirect_to)
            for name, value in hosted.redirect_headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        total = len(hosted.content)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        same = handler.headers.get("If-Range", hosted.etag) == hosted.etag
        is_partial = bool(found) and hosted.has_ranges and same
        start = int(found[1]) if is_partial else 0
        end = min(int(found[2]) + 1 if is_partial and found[2] else total, total)
        asked.start, asked.end = start, end
        handler.send_response(206 if is_partial else 200)
        if hosted.etag:
            handler.send_header("ETag", hosted.etag)
        handler.send_header("Content-Type", hosted.content_type)
        if hosted.encoding:
            handler.send_header("Content-Encoding", hosted.encoding)
        if is_partial:
            handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{total}")
        if hosted.is_chunked:
            handler.send_header("Transfer-Encoding", "chunked")
        else:
            handler.send_header("Content-Length", str(end - start))
        handler.end_headers()
        if not with_body:
            return
        with self._lock:
            cut = hosted.cut_after.pop(0) if hosted.cut_after else None
        self._send(handler, hosted, asked, start, end if cut is None else min(end, start + cut))
        if cut is not None and start + cut < end:
            handler.close_connection = True
        elif hosted.is_chunked:
            handler.wfile.write(b"0\r\n\r\n")

    def _send(self, handler: BaseHTTPRequestHandler, hosted: Hosted, asked: Asked, start: int, end: int) -> None:
        position = start
        try:
            while position < end:
                block = hosted.content[position : min(end, position + 65536)]
                if hosted.bytes_per_s:
                    block = block[: max(1, int(hosted.bytes_per_s * 0.02))]
                    time.sleep(len(block) / hosted.bytes_per_s)
                position += len(block)
                asked.sent += len(block)  # before: who has read it may ask at once how much was sent
                handler.wfile.write(f"{len(block):x}\r\n".encode() + block + b"\r\n" if hosted.is_chunked else block)
        except OSError:
            handler.close_connection = True


@contextmanager
def model_server() -> Iterator[ModelServer]:
    server = ModelServer()
    try:
        yield server
    finally:
        server.close()


def a_safetensors_file(size_bytes: int, *, seed: int = 1) -> bytes:
    """A whole, valid file of exactly that size with one tensor of random bytes."""
    count = size_bytes - 8 - 96
    text = json.dumps({"w": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}).encode().ljust(96)
    return struct.pack("<Q", len(text)) + text + random.Random(seed).randbytes(count)
