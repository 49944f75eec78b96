"""The image's file system without an image: the Dockerfile's own commands, run by script in a folder.

Only what needs root or a distribution (`apt-get`, `useradd`) is left out. No network: the wheel is installed alone, and
its dependencies are this interpreter's, seen through a `.pth` file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = "/opt/comfyfleet"
NEEDS_A_DISTRIBUTION = ("apt-get", "useradd")


def instructions() -> list[tuple[str, str]]:
    """(name, value) of each instruction, continuation lines joined."""
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def the(name: str) -> str:
    """The last instruction of that name."""
    return [value for found, value in instructions() if found == name][-1]


@dataclass(frozen=True, kw_only=True)
class PlainImage:
    """home: what is /opt/comfyfleet in the image. env: what a process in it gets."""

    home: Path
    env: dict[str, str]

    def moved(self, text: str, data_dir: Path) -> str:
        """`text` with the image's and the units' folders where they are here."""
        for place, here in ((HOME, self.home), ("/workspace", data_dir), ("/var/lib/comfyfleet", data_dir)):
            text = text.replace(place, str(here))
        return text

    def shell(self, script: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", script],
            cwd=self.home,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=300,
        )


def build(home: Path) -> PlainImage:
    """COPY and RUN of the CPU image, in their order."""
    home.mkdir(parents=True)
    env = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "TMPDIR")} | {
        "PATH": f"{home / 'venv' / 'bin'}:{os.environ['PATH']}",
        "COMFYFLEET_DATA_DIR": str(home / "workspace"),
        "XDG_CONFIG_HOME": str(home / "config"),
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    image = PlainImage(home=home, env=env)
    for name, value in instructions():
        if name == "ARG" and "=" in value:
            argument, _, default = value.partition("=")
            env.setdefault(argument, default)
        elif name == "COPY":
            *sources, target = [word for word in value.split() if not word.startswith("--")]
            for source in sources:
                place = home / target if len(sources) == 1 else home / target / Path(source).name
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, place)
        elif name == "RUN" and not any(word in value for word in NEEDS_A_DISTRIBUTION) and "provision" not in value:
            done = image.shell(
                "set -e\n" + image.moved(value, home / "workspace").replace("python3 ", f"{sys.executable} ")
            )
            assert done.returncode == 0, f"{value}\n{done.stdout}\n{done.stderr}"
            _lend_packages(home)
    return image


def _lend_packages(home: Path) -> None:
    for site in (home / "venv" / "lib").glob("python*/site-packages"):
        (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")


@dataclass(frozen=True, kw_only=True)
class Started:
    """A command that runs. log: what it has printed so far is in there."""

    process: subprocess.Popen[bytes]
    log: Path

    def until(self, is_so: object, limit_s: float = 120.0) -> None:
        """Poll `is_so()`; fails with the log when the process ends or time is up."""
        until = time.monotonic() + limit_s
        while not is_so():  # type: ignore[operator]
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.2)

    def stop(self, limit_s: float) -> int:
        """SIGTERM, as every supervisor does; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=limit_s)


@contextmanager
def started(
    words: Sequence[str], log: Path, *, env: Mapping[str, str], listener: socket.socket | None = None
) -> Iterator[Started]:
    """listener: handed over as systemd does it, as descriptor 3."""
    environment = dict(env)
    fds: tuple[int, ...] = ()
    if listener is not None:
        fds, environment["LISTEN_FDS"] = (listener.fileno(),), "1"
        words = ["bash", "-c", f'export LISTEN_PID=$$; exec "$@" 3<&{listener.fileno()}', "-", *words]
    with log.open("wb") as out:
        process = subprocess.Popen(
            list(words), env=environment, cwd=log.parent, stdout=out, stderr=out, pass_fds=fds, start_new_session=True
        )
    try:
        yield Started(process=process, log=log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def words_of(value: str) -> list[str]:
    """An instruction in its exec form."""
    return json.loads(value)
