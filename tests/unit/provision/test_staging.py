"""The staged file of a download, when its disk says no."""

from __future__ import annotations

import errno
import os

import pytest

from comfyfleet.provision.chunks import Identity
from comfyfleet.provision.staging import disk_trouble_told, staged
from comfyfleet.wire.errors import DiskFull, ProvisionFailed


@pytest.mark.anyio
async def test_a_disk_that_stops_taking_bytes_is_no_network_that_may_recover(tmp_path) -> None:
    async with staged(tmp_path / "song.safetensors") as file:
        file.begin(Identity(size_bytes=10), chunk_bytes=10)
        read_only = os.open(file.path, os.O_RDONLY)
        os.dup2(read_only, file.fd)
        os.close(read_only)

        with pytest.raises(ProvisionFailed, match=r"song\.safetensors cannot be written: Bad file descriptor"):
            await file.write([b"bytes"], 0)


@pytest.mark.parametrize(
    ("number", "told"), [(errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull), (errno.EROFS, ProvisionFailed)]
)
def test_a_full_disk_is_told_apart_from_one_that_refuses(tmp_path, number, told) -> None:
    with pytest.raises(told, match=r"song\.safetensors"), disk_trouble_told(tmp_path / "song.safetensors", 10):
        raise OSError(number, os.strerror(number))
