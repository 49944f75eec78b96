"""Where kept files are written before they get their names, and what lies ready there: empty files and folders.

To find a free inode may take ext4 0.1 to 0.6 ms, to move one takes 0.02 (measured; one without a journal passes over
every inode that was freed in the last minutes). So a few are made in a thread while nobody waits, and moved to their
names when they are wanted. Who finds none left, or finds that somebody in need of room has cleaned them away, makes
its own. What is written here is at its name whole, or not at all.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections import deque
from pathlib import Path

import anyio
import anyio.to_thread
import structlog

log = structlog.get_logger()

# Of a trivial job: one file and two folders.
_SPARE_FILES, _SPARE_FOLDERS = 8, 16


class Drafts:
    """`folder` is this process' own, on the disk of what it keeps. Without `run` nothing lies ready; all else works.

    `place` and `make_folders` block, for less than a millisecond, and may be called from any thread.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._files: deque[str] = deque()
        self._folders: deque[str] = deque()
        self._wanted = anyio.Event()

    def clear(self) -> None:
        """Take away what a former life left. Blocking; before anything else is asked of this."""
        shutil.rmtree(self._folder, ignore_errors=True)

    async def run(self) -> None:
        """Until cancelled: keep some ready, made again at each `renew`."""
        while True:
            try:
                await anyio.to_thread.run_sync(self._make_ready)
            except OSError as problem:  # the loop's boundary: a full disk, most likely, and others tell of it
                log.debug("drafts.not_made", why=str(problem))
            await self._wanted.wait()
            self._wanted = anyio.Event()

    def renew(self) -> None:
        """Now is a good moment to replace what was taken, should it be half of it. For the event loop's thread only."""
        if 2 * len(self._files) <= _SPARE_FILES or 2 * len(self._folders) <= _SPARE_FOLDERS:
            self._wanted.set()

    def place(self, data: bytes, target: str) -> None:
        """Make `target` hold these bytes. Raises OSError."""
        draft, handle = self._open()
        try:
            try:
                left = memoryview(data)
                while left:
                    left = left[os.write(handle, left) :]
            finally:
                os.close(handle)
            try:
                os.replace(draft, target)
            except FileNotFoundError:  # the folder is not there yet
                self.make_folders(os.path.dirname(target))
                os.replace(draft, target)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft)
            raise

    def make_folders(self, path: str) -> None:
        """Make `path` a folder, and those above it. Raises OSError."""
        if os.path.isdir(path):
            return
        above = os.path.dirname(path)
        if not os.path.isdir(above):
            self.make_folders(above)
        with contextlib.suppress(IndexError, OSError):
            os.rename(self._folders.popleft(), path)
            return
        os.makedirs(path, exist_ok=True)

    def _open(self) -> tuple[str, int]:
        with contextlib.suppress(IndexError, FileNotFoundError):
            draft = self._files.popleft()
            return draft, os.open(draft, os.O_WRONLY)
        return self._new_file()

    def _new_file(self) -> tuple[str, int]:
        draft = self._new_name()
        try:
            return draft, os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileNotFoundError:
            os.makedirs(self._folder, exist_ok=True)
            return draft, os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def _make_ready(self) -> None:
        os.makedirs(self._folder, exist_ok=True)
        for _ in range(_SPARE_FILES - len(self._files)):
            draft, handle = self._new_file()
            os.close(handle)
            self._files.append(draft)
        for _ in range(_SPARE_FOLDERS - len(self._folders)):
            folder = self._new_name()
            os.mkdir(folder)
            self._folders.append(folder)

    def _new_name(self) -> str:
        return f"{self._folder}/.part-{secrets.token_hex(6)}"
