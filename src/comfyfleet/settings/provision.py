"""Where models come from and with which tokens: `HF_TOKEN`, `HF_ENDPOINT`, `CIVITAI_TOKEN`, ours `COMFYFLEET_*`.

`COMFYFLEET_MODEL_MIRRORS`: base URLs, separated by commas, that hold `<folder>/<name>` and are asked first.
`COMFYFLEET_OFFLINE_DIR`: a folder with the same layout; when it is set, nothing is asked of the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HUB = "https://huggingface.co"


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """hub: base URL behind `hf://`. Tokens go to their own hosts only (`provision.sources`)."""

    hub: str = HUB
    hub_token: str = field(default="", repr=False)
    civitai_token: str = field(default="", repr=False)
    mirrors: tuple[str, ...] = ()
    offline_dir: Path | None = None

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
        )
