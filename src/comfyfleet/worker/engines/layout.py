"""Which engines this worker has: found ones by their URLs, or one of ours per GPU. Pure but for counting GPUs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from comfyfleet.gpu import gpu_facts
from comfyfleet.provision.comfyui import interpreter
from comfyfleet.settings.worker import EngineSettings, FolderSettings
from comfyfleet.worker.engines.supervisor import Launch


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """One engine to be. launch None: it runs already, somebody else's."""

    name: str
    base_url: str
    folders: Mapping[str, Path]
    gpu: str
    launch: Launch | None


def plan_engines(engines: EngineSettings, folders: FolderSettings, env: Mapping[str, str]) -> list[EnginePlan]:
    """At least one plan. `env` is what children get, plus their GPU."""
    if engines.backends:
        return [
            EnginePlan(
                name=f"backend-{index}",
                base_url=url,
                folders=_foreign_folders(engines.install_path, folders.worker_dir),
                gpu="",
                launch=None,
            )
            for index, url in enumerate(engines.backends)
        ]
    gpus = engines.gpus or _gpus_of(env)
    return [_own(index, gpu, engines, folders, env) for index, gpu in enumerate(gpus or ("",))]


def _own(index: int, gpu: str, engines: EngineSettings, folders: FolderSettings, env: Mapping[str, str]) -> EnginePlan:
    root = folders.worker_dir / "engine"
    # Two servers on one output folder can pick the same file name; inputs are shared, since they come first.
    own = {"output": root / f"output-{index}", "temp": root / f"temp-{index}", "input": root / "input"}
    for path in own.values():
        path.mkdir(parents=True, exist_ok=True)
    port = engines.port + index
    child_env = {**env, "PYTHONUNBUFFERED": "1"}
    if gpu:
        child_env["CUDA_VISIBLE_DEVICES"] = gpu
    places = [
        *("--port", str(port)),
        *("--input-dir", str(own["input"])),
        *("--output-dir", str(own["output"])),
        *("--temp-dir", str(own["temp"])),
    ]
    cwd = folders.worker_dir
    if engines.command:
        command = (*engines.command, *places)
    elif engines.install_path is not None:
        cwd = engines.install_path
        command = (
            *(interpreter(engines.install_path), "main.py", "--listen", "127.0.0.1", "--port", str(port)),
            *("--input-directory", str(own["input"])),
            *("--output-directory", str(own["output"])),
            *("--temp-directory", str(own["temp"])),
            *engines.comfyui_args,
        )
    else:
        command = (
            *(sys.executable, "-m", "comfyfleet", "engine", "--host", "127.0.0.1", *places),
            *("--models-dir", str(folders.models_dir)),
            *("--miniatures-dir", str(folders.miniatures_dir)),
            *("--device", "cuda:0" if gpu else "cpu"),
            *engines.engine_args,
        )
    return EnginePlan(
        name=f"engine-{index}",
        base_url=f"http://127.0.0.1:{port}",
        folders=own,
        gpu=gpu,
        launch=Launch(
            command=command, env=child_env, cwd=cwd, log_path=folders.worker_dir / "logs" / f"engine-{index}.log"
        ),
    )


def _foreign_folders(install_path: Path | None, worker_dir: Path) -> dict[str, Path]:
    if install_path is not None:
        return {name: install_path / name for name in ("output", "temp", "input")}
    return {name: worker_dir / "engine" / f"pulled-{name}" for name in ("output", "temp", "input")}


def _gpus_of(env: Mapping[str, str]) -> tuple[str, ...]:
    """GPU indices to give out: those the environment allows, else all that the driver names."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(part.strip() for part in visible.split(",") if part.strip() and part.strip() != "-1")
    return tuple(str(card.index) for card in gpu_facts())
