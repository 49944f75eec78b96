"""Take a model from a folder instead of the network: `<dir>/<folder>/<name>`, or `<dir>/<name>`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import anyio.to_thread

from comfyfleet.provision.staging import Staged, disk_trouble_told
from comfyfleet.provision.template import ModelFile
from comfyfleet.wire.errors import ProvisionFailed

_BLOCK_BYTES = 2**20


async def copy_from(offline_dir: Path, model: ModelFile, file: Staged) -> str:
    """Copy it into the staged file; its SHA-256. Raises ProvisionFailed when the folder lacks it, DiskFull."""
    for path in (offline_dir / model.relative_path, offline_dir / model.name):
        if path.is_file():
            return await anyio.to_thread.run_sync(_copy, path, file)
    raise ProvisionFailed(
        f"{model.relative_path} is not in the offline folder, and with one nothing is asked of the network",
        file=model.name,
        reason="offline",
    )


def _copy(path: Path, file: Staged) -> str:
    file.forget()
    digest = hashlib.sha256()
    with path.open("rb") as source, disk_trouble_told(file.target, path.stat().st_size):
        os.ftruncate(file.fd, 0)
        offset = 0
        while block := source.read(_BLOCK_BYTES):
            digest.update(block)
            offset += os.pwrite(file.fd, block, offset)
    return digest.hexdigest()
