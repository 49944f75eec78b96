"""comfyfleet: an open, self-hostable serverless platform for ComfyUI workflows.

`Serverless` and `SyncServerless` are what callers import; everything else is a role with a folder of its own
(see ARCHITECTURE.md). Importing this package loads the client only: no torch, no server, no database.
"""

from __future__ import annotations

__version__ = "0.1.0"
