"""A worker's settings: the names that users of the documents already set, then ours (`COMFYFLEET_*`).

Only reading and checking; what a role does with a value stands there. Unset and empty mean the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from comfyfleet.settings.machine import default_data_dir
from comfyfleet.settings.outreach import FetchSettings, WebhookSettings
from comfyfleet.settings.storage import StorageSettings
from comfyfleet.wire.errors import BadRequest


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Which engines there are. backends: base URLs of engines that run already; else we start our own."""

    backends: tuple[str, ...]
    install_path: Path | None  # a real ComfyUI to start; None starts the embedded engine
    comfyui_args: tuple[str, ...]
    port: int
    gpus: tuple[str, ...]  # CUDA_VISIBLE_DEVICES of each child; () asks the machine
    engine_args: tuple[str, ...] = ()  # appended to the embedded engine's command line
    command: tuple[str, ...] = ()  # a whole command line instead (tests: the fake engine)


@dataclass(frozen=True, kw_only=True)
class QueueSettings:
    """Bounds of waiting work and of what is remembered."""

    max_queue_size: int
    result_ttl_s: float
    drop_grace_s: float = 1.5
    stuck_limit_s: float = 120.0  # of a cancelled prompt that no interrupt reaches, before its engine is started anew


@dataclass(frozen=True, kw_only=True)
class WrapperSettings:
    """The wrapper's own listener."""

    host: str
    port: int
    key: str
    include_comfyui_response: bool
    max_body_bytes: int


@dataclass(frozen=True, kw_only=True)
class FolderSettings:
    """Where things lie. `worker_dir` is this worker's alone; data_dir is shared by all on the machine."""

    data_dir: Path
    worker_dir: Path
    models_dir: Path
    output_dir: Path
    miniatures_dir: Path
    templates_dir: Path | None
    files_key_file: Path


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Everything a wrapper reads from its environment; the agent's part is `settings.agent`."""

    engines: EngineSettings
    queue: QueueSettings
    wrapper: WrapperSettings
    folders: FolderSettings
    webhook: WebhookSettings
    fetch: FetchSettings
    storage: StorageSettings
    log_level: str


_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def from_environment(env: Mapping[str, str]) -> WorkerSettings:
    """Settings of the worker that runs under `env`. Raises BadRequest naming a variable that cannot be read."""
    try:
        storage, fetch = StorageSettings.from_environment(env), FetchSettings.from_environment(env)
        webhook = WebhookSettings.from_environment(env)
    except ValueError as problem:
        raise BadRequest(str(problem)) from problem
    data_dir = default_data_dir(env)
    host, key = env.get("COMFYFLEET_WRAPPER_HOST") or "127.0.0.1", env.get("COMFYFLEET_WORKER_KEY") or ""
    if not key and host not in _LOOPBACK:
        raise BadRequest(f"listening on {host} needs COMFYFLEET_WORKER_KEY", variable="COMFYFLEET_WORKER_KEY")
    worker_dir = Path(env.get("COMFYFLEET_WORKER_DIR") or data_dir / "workers" / "standalone").expanduser()
    install = Path(env.get("COMFYUI_INSTALL_PATH") or "").expanduser()
    install_path = install if env.get("COMFYUI_INSTALL_PATH") and (install / "main.py").is_file() else None
    models_dir = install_path / "models" if install_path else data_dir / "models"
    backends = env.get("COMFYUI_BACKENDS") or env.get("COMFYUI_API_BASE") or ""
    return WorkerSettings(
        engines=EngineSettings(
            backends=tuple(_base_url(part) for part in backends.split(",") if part.strip()),
            install_path=install_path,
            comfyui_args=tuple((env.get("COMFYUI_ARGS") or "").split()),
            port=_integer(env, "COMFYFLEET_ENGINE_PORT", 18188),
            gpus=tuple(part.strip() for part in (env.get("COMFYFLEET_GPUS") or "").split(",") if part.strip()),
            engine_args=tuple((env.get("COMFYFLEET_ENGINE_ARGS") or "").split()),
            command=tuple((env.get("COMFYFLEET_ENGINE_COMMAND") or "").split()),
        ),
        queue=QueueSettings(
            max_queue_size=_integer(env, "MAX_QUEUE_SIZE", 100),
            result_ttl_s=_integer(env, "API_CACHE_TTL", 21_600),
            stuck_limit_s=_integer(env, "COMFYFLEET_STUCK_LIMIT_S", 120),
        ),
        wrapper=WrapperSettings(
            host=host,
            port=_integer(env, "COMFYFLEET_WRAPPER_PORT", 18288),
            key=key,
            include_comfyui_response=_flag(env, "INCLUDE_COMFYUI_RESPONSE", True),
            max_body_bytes=_integer(env, "COMFYFLEET_MAX_BODY_BYTES", 64 * 2**20),
        ),
        folders=FolderSettings(
            data_dir=data_dir,
            worker_dir=worker_dir,
            models_dir=models_dir,
            output_dir=data_dir / "output",
            miniatures_dir=data_dir / "miniatures",
            templates_dir=Path(env["COMFYFLEET_WORKFLOWS_DIR"]) if env.get("COMFYFLEET_WORKFLOWS_DIR") else None,
            files_key_file=Path(storage.files_key_file or data_dir / "files.key"),
        ),
        webhook=webhook,
        fetch=fetch,
        storage=storage,
        log_level="debug" if _flag(env, "DEBUG", False) else "info",
    )


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    value = env.get(name) or ""
    try:
        return int(value) if value else default
    except ValueError:
        raise BadRequest(f"{name} must be a whole number, not {value!r}", variable=name) from None


def _flag(env: Mapping[str, str], name: str, default: bool) -> bool:
    value = (env.get(name) or "").strip().lower()
    return default if not value else value in ("1", "true", "yes", "on")


def _base_url(text: str) -> str:
    text = text.strip().rstrip("/")
    return text if "://" in text else f"http://{text}"
