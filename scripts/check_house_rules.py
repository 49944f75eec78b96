"""House rules that no linter knows: module size, hidden clocks and dice, orphan tasks, stray environment reads.

Prints one line per breach and exits 1 when there is any. The rules and the reasons stand in CONTRIBUTING.md.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULE_CEILING_LINES = 400

# (what, pattern, files under src/comfyfleet where it is allowed)
FORBIDDEN: list[tuple[str, re.Pattern[str], tuple[str, ...]]] = [
    (
        "hidden clock: take a Clock instead",
        re.compile(r"\bdatetime\.now\(|\btime\.(time|monotonic|perf_counter|time_ns|monotonic_ns)\("),
        ("clock.py",),
    ),
    (
        "hidden dice: take ids or a Random instead",
        re.compile(r"\buuid4\(|(?<![\w.])random\.\w+\("),
        ("ids.py",),
    ),
    (
        "orphan task: use a task group",
        re.compile(r"\bcreate_task\(|\bensure_future\(|\basyncio\.gather\("),
        (),
    ),
    ("environment read in passing", re.compile(r"\bos\.(environ|getenv)\b"), ("settings/", "cli/")),
]
FORBIDDEN_NAMES = re.compile(r"^(utils?|helpers?|common|managers?|misc)$")


def breaches() -> list[str]:
    """Every breach in the tree, as `path:line what`."""
    found = []
    for path in sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("bench/**/*.py")]):
        shown = path.relative_to(ROOT)
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > MODULE_CEILING_LINES:
            found.append(f"{shown}:1 {len(lines)} lines, the ceiling is {MODULE_CEILING_LINES}: split it by its nouns")
        if FORBIDDEN_NAMES.match(path.stem):
            found.append(f"{shown}:1 a module named {path.stem!r} says nothing: name it by its noun")
        if "src" not in shown.parts:
            continue
        inside = path.relative_to(ROOT / "src" / "comfyfleet").as_posix()
        for what, pattern, allowed in FORBIDDEN:
            if any(inside == place or inside.startswith(place) for place in allowed if place):
                continue
            for number, line in enumerate(lines, start=1):
                if pattern.search(line) and not line.lstrip().startswith("#"):
                    found.append(f"{shown}:{number} {what}")
    return found


if __name__ == "__main__":
    problems = breaches()
    print("\n".join(problems) if problems else "house rules hold")
    sys.exit(1 if problems else 0)
