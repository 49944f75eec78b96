"""Install a pinned ComfyUI with pinned custom nodes in an environment of its own, and prove that its nodes import.

ComfyUI stays a program beside ours: it is cloned, never imported. An install that was there before is not touched.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import aiohttp
import anyio
import anyio.abc

from comfyfleet.clock import Clock
from comfyfleet.provision.checkout import checkout, make_venv, venv_python
from comfyfleet.provision.template import CustomNode
from comfyfleet.wire.errors import ProvisionFailed

REPOSITORY = "https://github.com/comfyanonymous/ComfyUI.git"
REF = "v0.3.64"
START_LIMIT_S = 300.0
_POLL_S = 0.25
_TAIL_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Install:
    """Where, what, and with which nodes."""

    path: Path
    repository: str = REPOSITORY
    ref: str = REF
    custom_nodes: Sequence[CustomNode] = ()


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Node classes that the started server has, and the custom nodes that gave it none."""

    classes: frozenset[str]
    silent_nodes: tuple[str, ...]


def node_folder(node: CustomNode) -> str:
    """The folder's name below custom_nodes: the repository's."""
    return PurePosixPath(node.repository.rstrip("/")).name.removesuffix(".git")


async def install(what: Install, say: Callable[[str], None]) -> None:
    """Raises ProvisionFailed naming the step. Doing it again repairs what was cut off and changes nothing else."""
    say(f"ComfyUI {what.ref} into {what.path}")
    await checkout(what.repository, what.ref, what.path)
    say("its requirements, in an environment of its own")
    requirements = what.path / "requirements.txt"
    wanted = ["-r", str(requirements)] if requirements.is_file() else []
    await make_venv(what.path / "venv", sys.executable, wanted)
    for node in what.custom_nodes:
        name = node_folder(node)
        say(f"custom node {name} at {node.commit[:12]}")
        folder = what.path / "custom_nodes" / name
        await checkout(node.repository, node.commit, folder)
        if (folder / "requirements.txt").is_file():
            await make_venv(what.path / "venv", sys.executable, ["-r", str(folder / "requirements.txt")])


def interpreter(path: Path) -> str:
    """The Python of an install: its own environment's, else ours."""
    for folder in ("venv", ".venv"):
        if venv_python(path / folder).exists():
            return str(venv_python(path / folder))
    return sys.executable


async def prove(path: Path, custom_nodes: Sequence[CustomNode], clock: Clock) -> Proof:
    """Start it once without a GPU and ask what it has. Raises ProvisionFailed with its last words."""
    port = _free_port()
    command = [interpreter(path), "main.py", "--listen", "127.0.0.1", "--port", str(port), "--cpu"]
    log_path = path / "provision-check.log"
    async with AsyncExitStack() as stack:
        output = stack.enter_context(log_path.open("wb"))
        process = await anyio.open_process(
            command, cwd=path, stdin=None, stdout=output, stderr=output, start_new_session=True
        )
        try:
            info = await _object_info(f"http://127.0.0.1:{port}/object_info", process, log_path, clock)
        finally:
            _end(process)
            with anyio.CancelScope(shield=True):
                await process.wait()
    modules = {str(entry.get("python_module", "")) for entry in info.values() if isinstance(entry, dict)}
    silent = tuple(node_folder(node) for node in custom_nodes if f"custom_nodes.{node_folder(node)}" not in modules)
    return Proof(classes=frozenset(info), silent_nodes=silent)


async def _object_info(url: str, process: anyio.abc.Process, log_path: Path, clock: Clock) -> dict[str, Any]:
    with anyio.move_on_after(START_LIMIT_S):
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            while True:
                if process.returncode is not None:
                    raise ProvisionFailed(
                        f"ComfyUI ended with code {process.returncode}: {_last_line(log_path)}", reason="comfyui"
                    )
                try:
                    async with session.get(url) as answer:
                        if answer.status == 200:
                            found: dict[str, Any] = await answer.json()
                            return found
                except (aiohttp.ClientError, OSError):
                    pass  # not up yet
                await clock.sleep(_POLL_S)
    raise ProvisionFailed(
        f"ComfyUI did not answer within {START_LIMIT_S:g} s: {_last_line(log_path)}", reason="comfyui"
    )


def _last_line(log_path: Path) -> str:
    with log_path.open("rb") as file:
        file.seek(max(0, log_path.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def _end(process: anyio.abc.Process) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
