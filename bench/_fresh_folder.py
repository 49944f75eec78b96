"""A folder whose files cost what files cost, and not what the run before has deleted.

ext4 without a journal passes over every inode that was freed in the last minutes, one by one: a second run of a bench
that renders 2,000 files paid 0.4 ms for each of its own (measured). A folder below a "top-level" one lies in another
part of the disk. Elsewhere than on ext4 this is a temporary folder like any other.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def fresh_folder() -> Iterator[Path]:
    """Gone at the end."""
    with tempfile.TemporaryDirectory(prefix="cf-bench-") as above:
        with suppress(FileNotFoundError):  # without e2fsprogs
            subprocess.run(["chattr", "+T", above], check=False, capture_output=True)
        folder = Path(above) / Path(above).name.removeprefix("cf-bench-")
        folder.mkdir()
        yield folder
