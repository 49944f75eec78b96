"""How files get to an engine and back: by a shared folder where there is one, else over its HTTP.

Engines of ours share folders with us. A foreign one on this machine tells its folders in `/system_stats` (its command
line); one elsewhere is sent inputs by `/upload/image` and asked for outputs by `/view`, streamed to disk.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import anyio.to_thread

from comfyfleet.worker.engines.client import EngineClient
from comfyfleet.worker.stages.history_files import NamedFile, located
from comfyfleet.worker.stages.input_store import InputFile

KINDS = ("output", "temp", "input")


def told_folders(stats: Mapping[str, Any], base_url: str) -> dict[str, Path] | None:
    """The folders of an engine on this machine, from its command line; None when it is elsewhere or does not tell."""
    if not _is_here(base_url):
        return None
    argv = (stats.get("system") or {}).get("argv")
    if not isinstance(argv, list) or not argv or not all(isinstance(part, str) for part in argv):
        return None
    base = _option(argv, "--base-directory")
    root = Path(base) if base else Path(argv[0]).parent
    folders = {}
    for kind in KINDS:
        given = _option(argv, f"--{kind}-directory") or _option(argv, f"--{kind}-dir")
        path = Path(given) if given else root / kind
        if kind == "temp" and _option(argv, "--temp-directory"):
            path = path / "temp"  # ComfyUI puts a folder of this name into the one given
        folders[kind] = path
    is_usable = folders["output"].is_absolute() and folders["output"].is_dir()
    return folders if is_usable else None


async def place_inputs(
    client: EngineClient, folders: Mapping[str, Path], is_remote: bool, files: Sequence[InputFile]
) -> None:
    """Make fetched inputs loadable under their names. Raises EngineGone."""
    for file in files:
        if is_remote:
            await client.upload_input(file.path, file.name)
        else:
            await anyio.to_thread.run_sync(_link, file.path, folders["input"] / PurePosixPath(file.name))


async def pull_outputs(client: EngineClient, files: Iterable[NamedFile], folder: Path) -> set[str]:
    """Download what a prompt made to `<folder>/<type>/…`; the nodes whose files are gone. Raises EngineGone."""
    folders = {kind: folder / kind for kind in KINDS}
    gone = set()
    for named in files:
        target = located(named, folders)
        if named.text is not None or target is None:
            continue
        query = {"filename": named.filename, "subfolder": named.subfolder, "type": named.type}
        if not await client.view(query, Path(target)):
            gone.add(named.node_id)
    return gone


def _option(argv: list[str], name: str) -> str | None:
    for index, part in enumerate(argv):
        if part == name and index + 1 < len(argv):
            return argv[index + 1]
        if part.startswith(f"{name}="):
            return part.partition("=")[2]
    return None


def _is_here(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".part-{target.name}")
    try:
        os.link(source, draft)
    except OSError:
        shutil.copyfile(source, draft)
    os.replace(draft, target)
