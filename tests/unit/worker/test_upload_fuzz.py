"""Whatever bytes come as an upload: files are kept whole or it is a clear 4xx, and nothing is left over."""

from __future__ import annotations

import tempfile
from pathlib import Path

import anyio
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyfleet.testing.clock import FakeClock
from comfyfleet.wire.errors import FleetError
from comfyfleet.worker.api.upload import Upload
from comfyfleet.worker.stages.input_store import InputStore

PIECES = st.sampled_from(
    [
        b"--x", b"--x--", b"\r\n", b"\n", b"--", b"Content-Disposition: form-data; name=a; filename=b.png",
        b'Content-Disposition: form-data; name="a"; filename*=UTF-8\'\'%ff%', b"Content-Disposition:", b": : :",
        b"content-type: image/png", b"\x00\xff", b"filename=", b'"', b"data",
    ]
)  # fmt: skip
BODIES = st.lists(st.one_of(PIECES, st.binary(max_size=10)), max_size=14)
KINDS = st.one_of(
    st.just("multipart/form-data; boundary=x"),
    st.sampled_from(
        ["multipart/form-data", 'multipart/form-data; boundary="', "multipart/form-data; boundary=" + "y" * 300]
    ),
    st.text(st.characters(codec="latin-1"), max_size=30),
)


@given(chunks=BODIES, kind=KINDS)
@settings(max_examples=60, deadline=None)
def test_any_body_is_kept_whole_or_refused(chunks: list[bytes], kind: str) -> None:
    async def send() -> None:
        async def body():
            for chunk in chunks:
                yield chunk

        with tempfile.TemporaryDirectory() as folder:
            upload = Upload(InputStore(Path(folder), FakeClock(), max_bytes=10**9), max_bytes=10**6)
            status = 400
            try:
                files = await upload.receive(body(), kind)
            except FleetError as refusal:
                files, status = [], refusal.status
            assert 400 <= status < 500
            kept = {path.name: path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}
            assert kept == {one.name: one.size_bytes for one in files}

    anyio.run(send)
