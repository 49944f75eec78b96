"""A child that must not outlive its parent: it asks the kernel for SIGTERM on the parent's death.

The parent sets `COMFYFLEET_LIFELINE` to its own pid; the child takes it out of its environment, so that grandchildren
are tied to nobody. Doing this in the child, after exec, needs no code between fork and exec.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LIFELINE_VARIABLE = "COMFYFLEET_LIFELINE"
_PR_SET_PDEATHSIG = 1


def hold_lifeline() -> None:
    """Tie this process to its parent if the parent asked for it; exits at once when the parent is gone already."""
    parent = os.environ.pop(LIFELINE_VARIABLE, "")
    if not parent or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):
        sys.exit(1)
