"""What a server's work costs: processor time, which a busy machine stretches less than the clock."""

from __future__ import annotations

import psutil


def cpu_s(process: psutil.Process) -> float:
    """Seconds of processor time that the process has used, in user space and in the kernel."""
    used = process.cpu_times()
    return float(used.user + used.system)
