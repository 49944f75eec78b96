"""comfyfleet: an open, self-hostable serverless platform for ComfyUI workflows.

`Serverless` and `SyncServerless` are what callers import; everything else is a role with a folder of its own
(see ARCHITECTURE.md). The client loads on first use: `import comfyfleet` alone loads no torch, no server, no database.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfyfleet.version import __version__

__all__ = ["Endpoint", "Serverless", "ServerlessRequest", "SyncServerless", "__version__"]

if TYPE_CHECKING:
    from comfyfleet.client import Endpoint, Serverless, ServerlessRequest, SyncServerless


def __getattr__(name: str) -> Any:
    # Every role imports this package; only a caller of the client should pay for loading it.
    if name in __all__:
        from comfyfleet import client

        return getattr(client, name)
    raise AttributeError(f"module 'comfyfleet' has no attribute {name!r}")
