"""Where things are on one machine, and what marks a process as ours. Shared by `up`, the control plane and workers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

# Every process started under `comfyfleet up` carries this variable with the data directory's real path: the proof
# that lets a later `up` end the orphans of a killed one, and only those.
OWNER_VARIABLE = "COMFYFLEET_OWNER"


def default_data_dir(env: Mapping[str, str]) -> Path:
    """`COMFYFLEET_DATA_DIR`, else `$XDG_DATA_HOME/comfyfleet`, else `~/.local/share/comfyfleet`."""
    if given := env.get("COMFYFLEET_DATA_DIR"):
        return Path(given).expanduser()
    base = env.get("XDG_DATA_HOME") or str(Path(env.get("HOME") or "~").expanduser() / ".local" / "share")
    return Path(base) / "comfyfleet"
