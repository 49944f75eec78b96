"""Where a client finds its control plane: argument, then environment, then the file that `comfyfleet up` wrote.

`COMFYFLEET_URL` and `COMFYFLEET_API_KEY` (or `VAST_API_KEY`, which users of the documents have set) beat
`$XDG_CONFIG_HOME/comfyfleet/client.toml`. Each value is looked up on its own, so a key may come from the environment
and the address from the file.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """url: base address, no trailing slash, or "" when unknown. api_key: "" when unknown."""

    url: str
    api_key: str


def config_file(env: Mapping[str, str]) -> Path:
    """Where client.toml is linked for this user."""
    base = env.get("XDG_CONFIG_HOME") or str(Path(env.get("HOME") or "~").expanduser() / ".config")
    return Path(base) / "comfyfleet" / "client.toml"


def client_settings(
    *, url: str | None = None, api_key: str | None = None, env: Mapping[str, str] | None = None
) -> ClientSettings:
    """Resolve address and key; an unreadable file counts as absent, a malformed one raises ValueError."""
    env = os.environ if env is None else env
    from_file: dict[str, object] = {}
    path = config_file(env)
    try:
        from_file = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        pass
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    found_url = url or env.get("COMFYFLEET_URL") or str(from_file.get("url", ""))
    found_key = api_key or env.get("COMFYFLEET_API_KEY") or env.get("VAST_API_KEY") or str(from_file.get("api_key", ""))
    return ClientSettings(url=found_url.rstrip("/"), api_key=found_key)
