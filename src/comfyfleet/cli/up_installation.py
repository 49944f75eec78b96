"""What `comfyfleet up` finds and makes on disk: the lock, orphans of a killed run, client.toml. No long-lived process.

A process is proven ours by its environment (`COMFYFLEET_OWNER` is the data directory's real path), never by its name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import psutil
import structlog

from comfyfleet.settings.machine import OWNER_VARIABLE
from comfyfleet.wire.errors import FleetError

log = structlog.get_logger()


class AlreadyRunning(FleetError):
    """Another `comfyfleet up` holds this data directory."""

    code, status = "already_running", 409


@contextlib.contextmanager
def held_lock(data_dir: Path) -> Iterator[TextIO]:
    """Hold the data directory for this process; raises AlreadyRunning, saying where the other one is.

    The lock is the kernel's (flock), so a killed holder leaves none behind. `say_where` writes into what it yields.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "up.lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            where = lock.read().strip() or "an address that it has not told yet"
            raise AlreadyRunning(f"comfyfleet is already running on {data_dir}: {where}") from error
        lock.truncate(0)
        yield lock


def say_where(lock: TextIO, url: str) -> None:
    """What a second `up` on the same data directory is told."""
    lock.write(f"{url} (pid {os.getpid()})\n")
    lock.flush()


def owned_processes(data_dir: Path) -> list[psutil.Process]:
    """Living processes, this one and its ancestors left out, that were started for this data directory."""
    owner = str(data_dir.resolve())
    own_line = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        if process.pid in own_line:
            continue
        with contextlib.suppress(psutil.Error):
            if process.environ().get(OWNER_VARIABLE) == owner and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_processes(processes: list[psutil.Process], *, grace_s: float) -> int:
    """SIGTERM, wait, SIGKILL; how many were ended. A pid that was reused in between is left alone (psutil checks)."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=5.0)
    return len(processes)


def write_client_file(data_dir: Path, *, url: str, api_key: str, link: Path | None) -> Path:
    """Write client.toml (mode 0600) and link it for this user; a file of the user's own is never replaced.

    Where the link cannot be made (a home that is read-only, or none) the file itself has to do.
    """
    path = data_dir / "client.toml"
    staging = path.with_suffix(".part")
    staging.unlink(missing_ok=True)
    with os.fdopen(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(f'# Written by `comfyfleet up`: where this machine\'s control plane is.\nurl = "{url}"\n')
        file.write(f'api_key = "{api_key}"\n')
    staging.replace(path)
    if link is not None and (link.is_symlink() or not link.exists()):
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
        except OSError as problem:
            log.warning("client_file.not_linked", link=str(link), reason=problem.strerror)
    return path
