"""What cannot be built on a test machine is read: compose, Dockerfile, units. And the commands in them exist."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from comfyfleet.cli.main import COMMANDS, command

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#")))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


def options_of(words: list[str]) -> tuple[str, set[str]]:
    return words[0], {word.partition("=")[0] for word in words[1:] if word.startswith("--")}


def check_command(words: list[str]) -> None:
    """`comfyfleet` followed by `words` names a command and options that exist."""
    name, options = options_of(words)
    assert name in COMMANDS
    found = command.get_command(None, name)  # type: ignore[arg-type]
    known = {option for parameter in found.params for option in parameter.opts}
    assert options <= known, f"{name} has no {options - known}"


def test_the_image_runs_as_an_ordinary_user_under_tini_with_a_health_check():
    found = instructions()
    names = [name for name, _ in found]
    users = [value for name, value in found if name == "USER"]

    assert users[-1] == "fleet"
    assert '"tini"' in next(value for name, value in found if name == "ENTRYPOINT")
    assert "HEALTHCHECK" in names
    assert {"image-cpu", "image-cuda"} <= set(re.findall(r"AS (\S+)", DOCKERFILE))
    assert "COPY . ." not in DOCKERFILE  # nothing gets in by accident


def test_what_the_dockerfile_copies_and_runs_exists():
    for name, value in instructions():
        if name == "COPY":
            for source in [word for word in value.split() if not word.startswith("--")][:-1]:
                assert (ROOT / source).exists(), source
    for line in re.findall(r"comfyfleet (provision .*?)(?: \\|$)", DOCKERFILE, re.MULTILINE):
        check_command(line.split())
    check_command(
        re.findall(r'"([^"]+)"', next(value for name, value in instructions() if name == "CMD" and "[" in value))
    )


def test_shell_lines_of_the_image_are_valid_shell(tmp_path):
    for number, (name, value) in enumerate(instructions()):
        if name == "RUN":
            script = tmp_path / f"{number}.sh"
            script.write_text(value)
            subprocess.run(["bash", "-n", str(script)], check=True)


def test_compose_has_the_four_parts_and_no_password_of_its_own():
    text = (ROOT / "docker" / "compose.yaml").read_text()
    compose = yaml.safe_load(text)

    assert {"control", "worker", "postgres", "s3"} <= set(compose["services"])
    for name in ("control", "worker"):
        check_command(compose["services"][name]["command"])
        assert all(port.startswith("127.0.0.1:") for port in compose["services"][name]["ports"])
    # A published port leads to no loopback.
    assert compose["services"]["control"]["environment"]["COMFYFLEET_WORKER_HOST"] == "0.0.0.0"
    named = {volume.split(":")[0] for service in compose["services"].values() for volume in service.get("volumes", [])}
    assert named == set(compose["volumes"])
    for variable in ("POSTGRES_PASSWORD", "S3_SECRET_ACCESS_KEY", "WORKER_TOKEN"):
        assert re.search(rf"\$\{{{variable}:\?", text), f"{variable} must be the operator's to set"


def test_the_ray_compose_file_has_two_of_all_that_may_be_lost_and_runs_commands_that_exist():
    text = (ROOT / "docker" / "compose.ray.yaml").read_text()
    services = yaml.safe_load(text)["services"]

    assert set(services) == {
        *("control-1", "control-2", "balancer", "postgres", "s3"),
        *("ray-head", "ray-node-1", "ray-node-2"),
    }
    for name in ("control-1", "control-2"):
        (script,) = services[name]["command"]
        subprocess.run(["bash", "-n", "-c", script], check=True)
        check_command(script.partition("exec comfyfleet ")[2].split())
        assert "--ray-address ray-head:6379" in script
        assert services[name]["environment"]["COMFYFLEET_ADVERTISE_URL"] == f"http://{name}:8080"
    ray_start = pytest.importorskip("ray.scripts.scripts").start
    for name in ("ray-head", "ray-node-1", "ray-node-2"):
        words = services[name]["entrypoint"][3:] + services[name]["command"]
        assert words[:2] == ["ray", "start"]
        known = {option for parameter in ray_start.params for option in parameter.opts}
        assert {word.partition("=")[0] for word in words[2:]} <= known
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", []))
    named = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    assert named == set(yaml.safe_load(text)["volumes"])
    for variable in ("POSTGRES_PASSWORD", "S3_SECRET_ACCESS_KEY", "MASTER_KEY"):
        assert re.search(rf"\$\{{{variable}:\?", text), f"{variable} must be the operator's to set"


@pytest.mark.parametrize("path", sorted((ROOT / "deploy").glob("*.service")), ids=lambda path: path.name)
def test_services_run_commands_that_exist_as_an_ordinary_user(path: Path):
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment]
    unit.read(path)

    words = unit["Service"]["ExecStart"].split()
    assert words[0].endswith("/comfyfleet")
    check_command(words[1:])
    assert unit["Service"]["User"] == "fleet"


def test_the_control_planes_socket_is_systemds():
    service = (ROOT / "deploy" / "comfyfleet-control.service").read_text()
    socket = (ROOT / "deploy" / "comfyfleet-control.socket").read_text()

    assert "Requires=comfyfleet-control.socket" in service
    assert "ListenStream=127.0.0.1:8080" in socket
    assert "--port" not in service


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
def test_systemd_reads_the_units(tmp_path):
    for path in (ROOT / "deploy").glob("comfyfleet-*"):
        text = path.read_text().replace("/opt/comfyfleet/venv/bin/comfyfleet", shutil.which("true") or "/bin/true")
        (tmp_path / path.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, sorted(tmp_path.glob("*.service")))],
        capture_output=True,
        text=True,
        timeout=60,
    )
    ours = [line for line in done.stderr.splitlines() if "comfyfleet" in line and "Unknown" in line]
    assert not ours, done.stderr


def test_supervisord_runs_commands_that_exist():
    found = configparser.ConfigParser(interpolation=None, comment_prefixes=(";",))
    found.read(ROOT / "deploy" / "supervisord.conf")
    for section in ("program:control", "program:wrapper"):
        check_command(found[section]["command"].split()[1:])


def test_every_documented_command_has_help():
    text = (ROOT / "docs" / "howto" / "deploy.md").read_text()
    for name in set(re.findall(r"comfyfleet (provision|clean|bench-worker|up)\b", text)):
        assert CliRunner().invoke(command, [name, "--help"]).exit_code == 0
