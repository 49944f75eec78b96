"""`python download_process.py URL FOLDER CHUNK_BYTES CONNECTIONS`: one download in a process that a test may kill."""

from __future__ import annotations

import sys
from pathlib import Path

import aiohttp
import anyio

from comfyfleet.clock import SystemClock
from comfyfleet.ids import SystemIds
from comfyfleet.provision.download import Downloader
from comfyfleet.provision.progress import FileProgress
from comfyfleet.provision.template import ModelFile
from comfyfleet.provision.transfer import TransferLimits
from comfyfleet.settings.provision import SourceSettings


async def main(url: str, folder: str, chunk_bytes: str, connections: str) -> None:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        downloader = Downloader(
            SourceSettings(),
            session=session,
            clock=SystemClock(),
            ids=SystemIds(),
            limits=TransferLimits(chunk_bytes=int(chunk_bytes), connections=int(connections), reserve_bytes=0),
        )
        model = ModelFile(url=url, folder="checkpoints", name="song.safetensors")
        await downloader.fetch(model, Path(folder), FileProgress(name=model.name))


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
