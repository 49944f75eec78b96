"""A process that is nobody's child: it outlives whoever started it, and its exit code is written down.

Ray ends what its actors started when an actor or a node's raylet ends; a worker that serves must outlive both (a lost
Ray head ends every raylet after a minute). A shell stands over the worker, in a session of its own, waits for it and
writes its exit code into `exit_code` beside the log.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

EXIT_FILE, PID_FILE = "exit_code", "pid"

# The inner shell stands over the worker. The outer one leaves at once, so that the inner one has init for a parent.
_OVER = '"$@" & echo $! > pid.new; mv pid.new pid; wait $!; echo $? > exit_code.new; mv exit_code.new exit_code'
_LAUNCH = 'setsid sh -c "$0" sh "$@" < /dev/null >> worker.log 2>&1 &'
_UNTIL_STARTED = "for i in $(seq 1000); do [ -f pid ] && exit 0; sleep 0.01; done; exit 1"
_STARTED_LIMIT_S = 10.0


def spawn(command: Sequence[str], *, folder: Path, environment: Mapping[str, str]) -> int:
    """Start it in `folder`, where its output goes to `worker.log`; its pid. Blocks for milliseconds."""
    for name in (EXIT_FILE, PID_FILE):
        (folder / name).unlink(missing_ok=True)
    subprocess.run(
        ["sh", "-c", f"{_LAUNCH} {_UNTIL_STARTED}", _OVER, *command],
        cwd=folder,
        env=dict(environment),
        check=True,
        stdin=subprocess.DEVNULL,
        timeout=2 * _STARTED_LIMIT_S,
    )
    return int((folder / PID_FILE).read_text())


def exit_code(folder: Path) -> int | None:
    """How the process ended, None while it runs or where nobody knows. Negative: by that signal."""
    with contextlib.suppress(OSError, ValueError):
        code = int((folder / EXIT_FILE).read_text())
        return 128 - code if code > 128 else code
    return None
