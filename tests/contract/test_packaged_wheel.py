"""The wheel: builds without a network, holds what is not Python, installs, and its command runs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    if subprocess.run([sys.executable, "-c", "import hatchling"], capture_output=True).returncode:
        pytest.skip("hatchling is not installed here; the wheel is built with it")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
            *("--disable-pip-version-check", "-w", str(folder), str(ROOT)),
        ],
        check=True,
        timeout=200,
    )
    return next(folder.glob("comfyfleet-*.whl"))


def test_the_wheel_holds_templates_graphs_and_workflows(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    inside = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "comfyfleet").rglob("*.*")}
    data = {name for name in inside if name.endswith((".toml", ".json", ".sql", ".html", ".js", ".css"))}

    assert "comfyfleet/provision/templates/ace-step.toml" in data
    assert "comfyfleet/provision/templates/graphs/benchmark-sd15.json" in data
    assert data <= names
    assert not [name for name in names if name.startswith(("tests/", "bench/"))]


def test_it_installs_and_its_command_runs_without_the_heavy_parts(wheel: Path, tmp_path: Path):
    target = tmp_path / "site"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"),
            *("--disable-pip-version-check", "--target", str(target), str(wheel)),
        ],
        check=True,
        timeout=200,
    )
    env = {**os.environ, "PYTHONPATH": str(target)}
    listed = subprocess.run(
        [sys.executable, "-m", "comfyfleet", "template", "list"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert listed.returncode == 0, listed.stderr
    assert {"ace-step", "custom", "local", "sd15", "wan-2.2-t2v"} <= {
        line.split()[0] for line in listed.stdout.splitlines()
    }
    assert (target / "bin" / "comfyfleet").exists()
