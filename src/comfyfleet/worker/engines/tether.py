"""`python -m comfyfleet.worker.engines.tether <parent pid> <command…>`: run a command that dies with its parent.

PR_SET_PDEATHSIG survives exec. If the parent is gone already when it is set, no signal would come: then we end at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    parent, command = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the worker that asked for this engine is gone")
    os.execvp(command[0], command)  # noqa: S606 - becoming the engine is the purpose


if __name__ == "__main__":
    main(sys.argv[1:])
