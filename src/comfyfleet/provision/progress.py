"""How far the downloads are, as values, and the one sentence that a user reads. Pure but for the counting."""

from __future__ import annotations

from dataclasses import dataclass, field

_WINDOW_S = 20.0


@dataclass(kw_only=True)
class FileProgress:
    """One file. size_bytes 0: not known yet. done_bytes includes what an earlier process had downloaded."""

    name: str
    size_bytes: int = 0
    done_bytes: int = 0
    fetched_bytes: int = 0  # over the network, in this process
    note: str = ""
    is_finished: bool = False


@dataclass(kw_only=True)
class Progress:
    """All files of one provisioning; `describe` may be called at any rate."""

    files: list[FileProgress] = field(default_factory=list)
    _samples: list[tuple[float, int]] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def done_bytes(self) -> int:
        return sum(file.done_bytes for file in self.files)

    @property
    def fetched_bytes(self) -> int:
        return sum(file.fetched_bytes for file in self.files)

    def rate_bytes_s(self, now: float) -> float:
        """Over the last twenty seconds; monotonic `now`."""
        self._samples.append((now, self.fetched_bytes))
        while len(self._samples) > 2 and now - self._samples[0][0] > _WINDOW_S:
            self._samples.pop(0)
        then, before = self._samples[0]
        return (self.fetched_bytes - before) / (now - then) if now > then else 0.0

    def describe(self, now: float) -> str:
        """`downloading 3 of 6, 41 %, 2 min left`."""
        finished = sum(file.is_finished for file in self.files)
        rate = self.rate_bytes_s(now)
        if finished >= len(self.files):
            return f"{finished} of {len(self.files)} files are there"
        parts = [f"downloading {min(finished + 1, len(self.files))} of {len(self.files)}"]
        if self.total_bytes and all(file.size_bytes for file in self.files):
            parts.append(f"{int(100 * self.done_bytes / self.total_bytes)} %")
            if rate > 0:
                parts.append(f"{duration((self.total_bytes - self.done_bytes) / rate)} left")
        parts.extend(file.note for file in self.files if file.note and not file.is_finished)
        return ", ".join(parts)

    def bars(self, width: int = 24) -> list[str]:
        """One bar a file that is under way."""
        lines = []
        for file in self.files:
            if file.is_finished or not file.size_bytes or not file.done_bytes:
                continue
            share = min(1.0, file.done_bytes / file.size_bytes)
            filled = int(share * width)
            lines.append(f"[{'#' * filled}{'.' * (width - filled)}] {share:4.0%} {file.name} ({size(file.size_bytes)})")
        return lines


def duration(seconds: float) -> str:
    """`40 s`, `2 min`, `3 h`: as exact as a guess may look."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{round(seconds / 3600)} h"


def size(count: float) -> str:
    """`6.74 GB`, decimal units as disks and hubs have them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
