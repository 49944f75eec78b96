"""What only a container or a service manager would run is run here by script, from a wheel in a plain environment."""

from __future__ import annotations

import configparser
import re
import shutil
import socket
import time
from pathlib import Path

import pytest
import yaml

from comfyfleet.cli.up_installation import owned_processes
from comfyfleet.testing.processes import free_port
from support.plain_image import (
    NEEDS_A_DISTRIBUTION,
    ROOT,
    PlainImage,
    build,
    instructions,
    started,
    the,
    words_of,
)

pytestmark = pytest.mark.slow

STOPS_WITHIN_S = 30.0
# Told to stop, each role ends in its own order; a supervisor sees a clean exit.
CLEAN = (0,)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> PlainImage:
    for needed in ("curl", "bash"):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed} is not on this machine")
    return build(tmp_path_factory.mktemp("image") / "comfyfleet")


def is_healthy(image: PlainImage, port: int) -> bool:
    """The image's own HEALTHCHECK command."""
    check = re.split(r"\bCMD\s+", the("HEALTHCHECK"))[1]
    done = image.shell(check, COMFYFLEET_HEALTH_PORT=str(port))
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 0


def on(words: list[str], port: int) -> list[str]:
    """The command on a port of its own, on loopback only: a test opens nothing to the network."""
    words = ["127.0.0.1" if word == "0.0.0.0" else word for word in words]
    if "--port" in words:
        words[words.index("--port") + 1] = str(port)
    return words


def environment(image: PlainImage, data_dir: Path, port: int, **more: str) -> dict[str, str]:
    data_dir.mkdir(exist_ok=True)
    return {
        **image.env,
        "COMFYFLEET_DATA_DIR": str(data_dir),
        "COMFYFLEET_WORKER_DIR": str(data_dir / "worker"),
        "COMFYFLEET_ENGINE_COMMAND": f"{image.home}/venv/bin/python -m comfyfleet.testing.fake_engine",
        "COMFYFLEET_ENGINE_PORT": str(free_port()),
        "COMFYFLEET_WRAPPER_PORT": str(port),
        **more,
    }


def nobody_serves(port: str, limit_s: float = 60.0) -> bool:
    """The engine goes with its worker."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(port))):
                return True
        time.sleep(0.1)
    return False


def test_the_wheels_command_is_the_one_that_the_image_runs(image: PlainImage):
    done = image.shell(
        "command -v comfyfleet && comfyfleet --help && python -c 'import comfyfleet; print(comfyfleet.__file__)'"
    )

    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first == str(image.home / "venv" / "bin" / "comfyfleet")
    assert Path(last).is_relative_to(image.home / "venv")  # not the checkout
    assert "provision" in done.stdout


def test_the_cuda_images_provisioning_is_planned_by_its_own_commands(image: PlainImage, tmp_path: Path):
    scripts = [value for name, value in instructions() if name == "RUN" and "comfyfleet provision" in value]
    assert scripts
    for script in scripts:
        done = image.shell(
            "set -e\n" + image.moved(script, tmp_path).replace("comfyfleet provision", "comfyfleet provision --dry-run")
        )
        assert done.returncode == 0, done.stderr
        assert f"in {image.home}/ComfyUI" in done.stdout
        assert "download checkpoints/v1-5-pruned-emaonly-fp16.safetensors  2.13 GB" in done.stdout


def test_every_run_line_is_run_here_or_needs_a_distribution():
    runs = [value for name, value in instructions() if name == "RUN"]
    left_out = [value for value in runs if any(word in value for word in NEEDS_A_DISTRIBUTION)]

    assert len(left_out) == 2
    assert len(runs) - len(left_out) >= 3


def test_the_images_entrypoint_comes_up_healthy_and_stops_on_a_signal(image: PlainImage, tmp_path: Path):
    entry, data_dir, port = words_of(the("ENTRYPOINT")), tmp_path / "workspace", free_port()
    words = [*entry[entry.index("--") + 1 :], *on(words_of(the("CMD")), port)]
    assert not is_healthy(image, port)

    with started(words, tmp_path / "log", env=environment(image, data_dir, port)) as up:
        up.until(lambda: is_healthy(image, port))
        code = up.stop(STOPS_WITHIN_S)

    assert code == 0
    assert not is_healthy(image, port)
    assert owned_processes(data_dir) == []


@pytest.mark.parametrize("service", ["control", "worker"])
def test_the_compose_files_commands_come_up_healthy(image: PlainImage, tmp_path: Path, service: str):
    found = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"][service]
    data_dir, port = tmp_path / "workspace", free_port()
    words = ["comfyfleet", *on([image.moved(word, data_dir) for word in found["command"]], port)]
    env = environment(image, data_dir, port, COMFYFLEET_WORKER_KEY="only-for-this-test")

    with started(words, tmp_path / "log", env=env) as running:
        running.until(lambda: is_healthy(image, port))
        assert running.stop(STOPS_WITHIN_S) in CLEAN

    assert nobody_serves(env["COMFYFLEET_ENGINE_PORT"])


def unit(name: str) -> configparser.SectionProxy:
    found = configparser.ConfigParser(strict=False, interpolation=None)
    found.optionxform = str  # type: ignore[assignment]
    found.read(ROOT / "deploy" / name)
    return found["Service"]


def test_the_control_planes_unit_serves_on_the_socket_that_systemd_holds(image: PlainImage, tmp_path: Path):
    service, data_dir = unit("comfyfleet-control.service"), tmp_path / "data"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        env = environment(image, data_dir, port)
        words = image.moved(service["ExecStart"], data_dir).split()
        with started(words, tmp_path / "log", env=env, listener=listener) as running:
            running.until(lambda: is_healthy(image, port))
            assert running.stop(float(service["TimeoutStopSec"])) == 0

    assert (data_dir / "admin.key").stat().st_mode & 0o777 == 0o600


def test_the_wrappers_unit_serves_with_its_own_environment(image: PlainImage, tmp_path: Path):
    service, data_dir, port = unit("comfyfleet-wrapper.service"), tmp_path / "data", free_port()
    name, value = image.moved(service["Environment"], data_dir).split("=", 1)
    env = environment(image, data_dir, port, **{name: value})
    env.pop("COMFYFLEET_WORKER_DIR")  # the unit sets none

    with started(image.moved(service["ExecStart"], data_dir).split(), tmp_path / "log", env=env) as running:
        running.until(lambda: is_healthy(image, port))
        assert running.stop(float(service["TimeoutStopSec"])) in CLEAN

    assert nobody_serves(env["COMFYFLEET_ENGINE_PORT"])
    assert list(data_dir.rglob("journal.sqlite3"))  # it kept its things where the unit says


@pytest.mark.parametrize("program", ["control", "wrapper"])
def test_supervisords_programs_come_up_and_stop_in_their_time(image: PlainImage, tmp_path: Path, program: str):
    found = configparser.ConfigParser(interpolation=None, comment_prefixes=(";",))
    found.read(ROOT / "deploy" / "supervisord.conf")
    section, data_dir, port = found[f"program:{program}"], tmp_path / "data", free_port()
    env = environment(image, data_dir, port)
    for pair in section.get("environment", "").split(","):
        if pair:
            name, _, value = pair.partition("=")
            env[name] = value.strip('"').replace("/var/log/portal", str(tmp_path))
    words = on(section["command"].replace("%(ENV_COMFYFLEET_DATA_DIR)s", str(data_dir)).split(), port)

    with started(words, tmp_path / "log", env=env) as running:
        running.until(lambda: is_healthy(image, port))
        if "MODEL_LOG" in env:  # written a moment after `/health` says so
            running.until(lambda: "BACKENDS_READY" in Path(env["MODEL_LOG"]).read_text())
        assert running.stop(float(section["stopwaitsecs"])) in CLEAN

    assert nobody_serves(env["COMFYFLEET_ENGINE_PORT"])
