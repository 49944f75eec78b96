"""The folder of each local worker: `local.json`, its log, and the processes that are provably its own. Not its life.

A process is proven ours by three things at once: the pid, the start time recorded with it, and the worker's folder in
its environment.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import msgspec
import psutil

from comfyfleet.control.fleet.slots import Slot

FOLDER_VARIABLE = "COMFYFLEET_WORKER_DIR"
_LOG_ROTATE_BYTES = 20 * 1024 * 1024


class LocalRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`local.json`. pid 0: not running. process_started: the kernel's start time of that pid (psutil's)."""

    id: int
    slot: Slot
    pid: int = 0
    process_started: float = 0.0
    started_at: float = 0.0
    exit_code: int | None = None
    incarnation: str = ""


class LocalFolders:
    """`<root>/<worker id>`, for as long as the worker exists."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def of(self, worker_id: int) -> Path:
        return self.root / str(worker_id)

    def has(self, worker_id: int) -> bool:
        return (self.of(worker_id) / "local.json").exists()

    def remove(self, worker_id: int) -> None:
        shutil.rmtree(self.of(worker_id), ignore_errors=True)

    # --- records -------------------------------------------------------------------------------------------------
    def records(self) -> list[LocalRecord]:
        """Every worker's record, in the order of their names."""
        found = []
        for path in sorted(self.root.glob("*/local.json")):
            with contextlib.suppress(OSError, msgspec.DecodeError):
                found.append(msgspec.json.decode(path.read_bytes(), type=LocalRecord))
        return found

    def record(self, worker_id: int) -> LocalRecord | None:
        return next((record for record in self.records() if record.id == worker_id), None)

    def write(self, record: LocalRecord) -> None:
        """Nothing for a worker whose folder is gone."""
        path = self.of(record.id) / "local.json"
        if not path.parent.exists():
            return
        draft = path.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode(record))
        draft.replace(path)

    # --- logs ----------------------------------------------------------------------------------------------------
    def log(self, worker_id: int) -> Path:
        return self.of(worker_id) / "worker.log"

    def rotate_log(self, worker_id: int) -> None:
        """Put a long one aside, once."""
        path = self.log(worker_id)
        if path.exists() and path.stat().st_size > _LOG_ROTATE_BYTES:
            path.replace(path.with_name("worker.log.1"))

    # --- processes -----------------------------------------------------------------------------------------------
    def process(self, record: LocalRecord) -> psutil.Process | None:
        """The living process of a record, if it is provably that one."""
        if not record.pid:
            return None
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(record.pid)
            if (
                abs(process.create_time() - record.process_started) < 1.0
                and process.status() != psutil.STATUS_ZOMBIE
                and process.environ().get(FOLDER_VARIABLE) == str(self.of(record.id))
            ):
                return process
        return None

    def session(self, worker_id: int) -> list[psutil.Process]:
        """Living processes whose environment names the worker's folder: engines that outlived their worker."""
        folder = str(self.of(worker_id))
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get(FOLDER_VARIABLE) == folder:
                    found.append(process)
        return found


def last_lines(path: Path, count: int, block: int = 64 * 1024) -> str:
    """The last lines of a text file, read from its end."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        data = b""
        while end > 0 and data.count(b"\n") <= count:
            start = max(0, end - block)
            file.seek(start)
            data = file.read(end - start) + data
            end = start
    return b"".join(data.splitlines(keepends=True)[-count:]).decode(errors="replace")
