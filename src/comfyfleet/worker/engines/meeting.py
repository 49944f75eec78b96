"""Getting to know an engine that answers: its version, and, of a foreign one, where its files are."""

from __future__ import annotations

import msgspec

from comfyfleet.worker.engines.client import EngineGone
from comfyfleet.worker.engines.pool import EngineSlot
from comfyfleet.worker.engines.reach import told_folders

_SOCKET_S = 5.0


async def meet(slot: EngineSlot) -> None:
    """Ask the engine what it is; its socket is open by then. Before this, nothing of a foreign one can be used."""
    await slot.client.until_connected(_SOCKET_S)
    try:
        stats = await slot.client.system_stats()
    except (EngineGone, msgspec.MsgspecError):
        slot.version = slot.version or "unknown"
        return
    slot.version = str((stats.get("system") or {}).get("comfyui_version") or "unknown")
    if not slot.owned:
        folders = told_folders(stats, slot.client.base_url)
        slot.is_remote = folders is None and not slot.folders["output"].is_dir()
        slot.folders = folders or slot.folders
