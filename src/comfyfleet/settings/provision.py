"""What a worker needs on disk, where it comes from and with which tokens, and how much disk stays free.

`HF_TOKEN`, `HF_ENDPOINT`, `CIVITAI_TOKEN`, `PROVISIONING_SCRIPT`, `MODEL_LOG`, `WORKSPACE`; ours `COMFYFLEET_*`.

`COMFYFLEET_MODEL_MIRRORS`: base URLs, separated by commas, that hold `<folder>/<name>` and are asked first.
`COMFYFLEET_OFFLINE_DIR`: a folder with the same layout; when it is set, nothing is asked of the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from comfyfleet.settings.storage import number

MIN_FREE_BYTES = 512 * 10**6
HUB = "https://huggingface.co"


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """hub: base URL behind `hf://`. Tokens go to their own hosts only (`provision.sources`)."""

    hub: str = HUB
    hub_token: str = field(default="", repr=False)
    civitai_token: str = field(default="", repr=False)
    mirrors: tuple[str, ...] = ()
    offline_dir: Path | None = None
    proxies: Mapping[str, str] = field(default_factory=dict, repr=False)  # http, https: URLs; no: hosts without one

    def proxy_for(self, scheme: str, host: str) -> str | None:
        """The proxy's URL for a request, if there is one. (A `.netrc` is not read: tokens have names of their own.)"""
        proxy = self.proxies.get(scheme)
        bare = [part.strip().lstrip("*.").lower() for part in self.proxies.get("no", "").split(",")]
        is_bare = any(part == host.lower() or (part and host.lower().endswith(f".{part}")) for part in bare)
        return None if not proxy or is_bare or self.proxies.get("no", "").strip() == "*" else proxy

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> SourceSettings:
        offline = env.get("COMFYFLEET_OFFLINE_DIR", "")
        mirrors = env.get("COMFYFLEET_MODEL_MIRRORS", "").split(",")
        return cls(
            hub=(env.get("HF_ENDPOINT") or HUB).rstrip("/"),
            hub_token=env.get("HF_TOKEN", "").strip(),
            civitai_token=env.get("CIVITAI_TOKEN", "").strip(),
            mirrors=tuple(mirror.strip().rstrip("/") for mirror in mirrors if mirror.strip()),
            offline_dir=Path(offline).expanduser() if offline else None,
            proxies={
                name: value
                for name in ("http", "https", "no")
                if (value := env.get(f"{name}_proxy") or env.get(f"{name.upper()}_PROXY"))
            },
        )


@dataclass(frozen=True, kw_only=True)
class ProvisionSettings:
    """What a worker gets before its engines start, and what it keeps free.

    script: URL or file of `PROVISIONING_SCRIPT`, run once per content. model_log: where foreign agents look for
    `BACKENDS_READY`. min_free_bytes, old_after_s: the clean-up rule. models_budget_bytes 0: models never go.
    """

    template: str
    script: str
    workspace: str
    model_log: Path
    sources: SourceSettings
    min_free_bytes: int
    old_after_s: float
    models_budget_bytes: int

    @classmethod
    def from_environment(cls, env: Mapping[str, str], worker_dir: Path) -> ProvisionSettings:
        """Raises ValueError naming the variable that is no number."""
        model_log = env.get("MODEL_LOG", "")
        return cls(
            template=env.get("COMFYFLEET_TEMPLATE") or "local",
            script=env.get("PROVISIONING_SCRIPT", "").strip(),
            workspace=env.get("WORKSPACE", ""),
            model_log=Path(model_log).expanduser() if model_log else worker_dir / "logs" / "model.log",
            sources=SourceSettings.from_environment(env),
            min_free_bytes=int(number(env, "COMFYFLEET_MIN_FREE_BYTES", MIN_FREE_BYTES)),
            old_after_s=number(env, "COMFYFLEET_CLEAN_AFTER_HOURS", 24.0) * 3600.0,
            models_budget_bytes=int(number(env, "COMFYFLEET_MODELS_BUDGET_BYTES", 0.0)),
        )
