"""The control plane's settings: arguments of `comfyfleet control`, else `COMFYFLEET_*` variables, else defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from comfyfleet.settings.machine import default_data_dir

DEFAULT_PORT = 8080
# A worker runs other people's nodes: it has no business with the keys to everything.
_NOT_FOR_WORKERS = frozenset({"COMFYFLEET_MASTER_KEY", "COMFYFLEET_DATABASE"})


@dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """public_url: how workers and callers reach it, no trailing slash; prices are per hour, in the operator's money.

    fd: an inherited listening socket, which then stands for host and port. max_workers: of the whole local fleet.
    report_url: where workers report, several separated by commas. advertise_url: how the other control planes of a
    shared database reach this one. master_key: the text of the data directory's `master.key`, so that several have the
    same. inherited: this process's environment, which local workers start from.
    """

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    fd: int | None = None
    public_url: str = ""
    advertise_url: str = ""
    report_url: str = ""
    master_key: str = field(default="", repr=False)
    fleet: str = "none"  # local | ray | none
    ray_address: str = ""  # host:port of the Ray head
    ray_namespace: str = "comfyfleet"
    database: str = ""
    max_workers: int = 0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    price_gpu_hour: float = 0.0
    price_storage_hour: float = 0.0
    retention_days: float = 7.0
    lost_after_s: float = 20.0  # how long a job's worker may be out of reach before another gets the job
    log_level: str = "info"
    inherited: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def base_url(self) -> str:
        """Where this control plane is for whoever is told nothing else."""
        return self.public_url or self._own_url

    @property
    def advertised_url(self) -> str:
        """Where this very process is, whatever stands in front of it."""
        return self.advertise_url or self._own_url

    @property
    def _own_url(self) -> str:
        scheme = "https" if self.tls_cert else "http"
        host = "127.0.0.1" if self.host in ("0.0.0.0", "") else "[::1]" if self.host == "::" else self.host  # noqa: S104
        return f"{scheme}://{host}:{self.port}"


def control_settings(env: Mapping[str, str], **given: object) -> ControlSettings:
    """Settings from arguments (None: not given) over the environment. Raises ValueError for a value of no sense."""
    values = {name: value for name, value in given.items() if value is not None}
    values.setdefault("data_dir", default_data_dir(env))
    for name, variable in (
        ("public_url", "COMFYFLEET_PUBLIC_URL"),
        ("advertise_url", "COMFYFLEET_ADVERTISE_URL"),
        ("report_url", "COMFYFLEET_REPORT_URL"),
        ("database", "COMFYFLEET_DATABASE"),
        ("master_key", "COMFYFLEET_MASTER_KEY"),
        ("ray_address", "COMFYFLEET_RAY_ADDRESS"),
        ("ray_namespace", "COMFYFLEET_RAY_NAMESPACE"),
    ):
        if text := env.get(variable):
            values.setdefault(name, text)
    for name in ("public_url", "advertise_url"):
        if name in values:
            values[name] = str(values[name]).rstrip("/")
            if not str(values[name]).startswith(("http://", "https://")):
                raise ValueError(f"{name} must be a whole http(s) address")
    if not str(values.get("database", "postgresql://")).startswith(("postgresql://", "postgres://")):
        raise ValueError("the database must be postgresql://…; without one it is the data directory's SQLite file")
    for name, variable in (
        ("price_gpu_hour", "COMFYFLEET_PRICE_GPU_HOUR"),
        ("price_storage_hour", "COMFYFLEET_PRICE_STORAGE_HOUR"),
        ("retention_days", "COMFYFLEET_RETENTION_DAYS"),
        ("lost_after_s", "COMFYFLEET_LOST_AFTER_S"),
    ):
        if text := env.get(variable):
            values.setdefault(name, float(text))
    if level := env.get("COMFYFLEET_LOG_LEVEL"):
        values.setdefault("log_level", level.lower())
    if "fd" not in values and env.get("LISTEN_FDS", "0") != "0":
        values["fd"] = 3  # systemd's socket activation: the first passed descriptor
    values["inherited"] = {name: value for name, value in env.items() if name not in _NOT_FOR_WORKERS}
    values["data_dir"] = Path(str(values["data_dir"])).resolve()
    if values.get("fleet") == "ray" and not values.get("ray_address"):
        raise ValueError("--fleet ray needs --ray-address HOST:PORT, the Ray head's")
    return ControlSettings(**values)  # type: ignore[arg-type]  # names and types are the dataclass's own
