"""What a worker reads from its environment, and what it refuses to start with."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from comfyfleet.cli.engine import command as engine_command
from comfyfleet.settings.worker import from_environment
from comfyfleet.wire.errors import BadRequest
from comfyfleet.worker.engines.layout import plan_engines


def test_empty_means_not_given_and_backends_may_lack_their_scheme(tmp_path):
    settings = from_environment(
        {"HOME": str(tmp_path), "MAX_QUEUE_SIZE": "", "COMFYUI_BACKENDS": "127.0.0.1:8188, http://gpu:1/ ,"}
    )

    assert settings.queue.max_queue_size == 100
    assert settings.engines.backends == ("http://127.0.0.1:8188", "http://gpu:1")


def test_listening_beyond_this_machine_needs_a_key(tmp_path):
    env = {"HOME": str(tmp_path), "COMFYFLEET_WRAPPER_HOST": "0.0.0.0"}
    with pytest.raises(BadRequest, match="COMFYFLEET_WORKER_KEY"):
        from_environment(env)

    assert from_environment({**env, "COMFYFLEET_WORKER_KEY": "k"}).wrapper.key == "k"


def test_a_number_that_is_none_is_named(tmp_path):
    with pytest.raises(BadRequest, match="MAX_QUEUE_SIZE"):
        from_environment({"HOME": str(tmp_path), "MAX_QUEUE_SIZE": "many"})


def test_one_engine_per_gpu_each_with_its_own_port_output_and_card(tmp_path):
    env = {"HOME": str(tmp_path), "COMFYFLEET_GPUS": "0,3"}
    settings = from_environment(env)

    first, second = plan_engines(settings.engines, settings.folders, env)

    assert (first.base_url, second.base_url) == ("http://127.0.0.1:18188", "http://127.0.0.1:18189")
    assert (first.launch.env["CUDA_VISIBLE_DEVICES"], second.launch.env["CUDA_VISIBLE_DEVICES"]) == ("0", "3")
    assert first.folders["output"] != second.folders["output"]
    assert first.folders["input"] == second.folders["input"]
    assert "cuda:0" in second.launch.command


def test_the_embedded_engine_takes_options_from_the_workers_environment(tmp_path):
    env = {"HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "COMFYFLEET_ENGINE_ARGS": "--compile --cache-mb 2000"}
    settings = from_environment(env)

    (plan,) = plan_engines(settings.engines, settings.folders, env)

    assert plan.launch.command[-3:] == ("--compile", "--cache-mb", "2000")
    options = CliRunner().invoke(engine_command, ["--help"]).output
    assert all(option in options for option in plan.launch.command if option.startswith("--"))


def test_a_real_comfyui_is_started_with_its_own_arguments(tmp_path):
    (tmp_path / "ComfyUI").mkdir()
    (tmp_path / "ComfyUI" / "main.py").touch()
    env = {"HOME": str(tmp_path), "COMFYUI_INSTALL_PATH": str(tmp_path / "ComfyUI"), "COMFYUI_ARGS": "--lowvram"}
    settings = from_environment(env)

    (plan,) = plan_engines(settings.engines, settings.folders, {**env, "CUDA_VISIBLE_DEVICES": ""})

    assert plan.launch.cwd == tmp_path / "ComfyUI"
    assert plan.launch.command[1] == "main.py"
    assert plan.launch.command[-1] == "--lowvram"
    assert settings.folders.models_dir == Path(tmp_path / "ComfyUI" / "models")
