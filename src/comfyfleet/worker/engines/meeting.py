"""Getting to know an engine that answers: its version, which of its nodes take files, and where a foreign one has its
own."""

from __future__ import annotations

import msgspec

from comfyfleet.wire.file_inputs import upload_inputs
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
    slot.uploads = await _uploads(slot)
    if not slot.owned:
        folders = told_folders(stats, slot.client.base_url)
        slot.is_remote = folders is None and not slot.folders["output"].is_dir()
        slot.folders = folders or slot.folders


async def _uploads(slot: EngineSlot) -> dict[str, frozenset[str]]:
    """Asked at each start: custom nodes come and go. One that does not say has those that everybody knows."""
    try:
        return upload_inputs(await slot.client.object_info())
    except (EngineGone, msgspec.MsgspecError):
        return {}
