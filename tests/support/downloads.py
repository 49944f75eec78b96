"""One download against the test server, with small chunks and short waits."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from comfyfleet.clock import SystemClock
from comfyfleet.ids import SystemIds
from comfyfleet.provision.download import Downloader
from comfyfleet.provision.progress import FileProgress
from comfyfleet.provision.template import ModelFile
from comfyfleet.provision.transfer import TransferLimits
from comfyfleet.retry import Backoff
from comfyfleet.settings.provision import SourceSettings
from support.model_server import a_safetensors_file

CHUNK = 64 * 1024
CONTENT = a_safetensors_file(10 * CHUNK + 12_345)
QUICK = TransferLimits(
    chunk_bytes=CHUNK,
    connections=3,
    idle_s=2.0,
    reserve_bytes=0,
    backoff=Backoff(first_s=0.01, factor=1.0, cap_s=0.01, attempts=4),
)


@asynccontextmanager
async def a_downloader(settings: SourceSettings | None = None, limits: TransferLimits = QUICK):
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield Downloader(
            settings or SourceSettings(), session=session, clock=SystemClock(), ids=SystemIds(), limits=limits
        )


def a_model(url: str, **known) -> ModelFile:
    return ModelFile(url=url, folder="checkpoints", name="song.safetensors", **known)


async def download(url: str, folder: Path, *, settings=None, limits=QUICK, **known) -> FileProgress:
    progress = FileProgress(name="song.safetensors")
    async with a_downloader(settings, limits) as downloader:
        await downloader.fetch(a_model(url, **known), folder, progress)
    return progress


def the_file(folder: Path) -> Path:
    return folder / "checkpoints" / "song.safetensors"
