"""The keys that several control planes of one database must have in common, kept there sealed under the master key.

Ticket keys, so that any worker checks any replica's tickets; the admin key; the keys of files, webhooks and the
certificate authority. Each replica keeps them as files as a lone one does: at start the files are made like what the
database has. The master key itself is never there: it is given to each replica (`master.key` in its data directory, or
`COMFYFLEET_MASTER_KEY`).
"""

from __future__ import annotations

import base64
import os
from pathlib import Path

import structlog

from comfyfleet.control.keys import Vault
from comfyfleet.control.store.base import Store
from comfyfleet.sealing import CannotOpen

log = structlog.get_logger()

SHARED = (
    "admin.key",
    "files.key",
    "webhooks.key",
    "ticket_rsa.pem",
    "ticket_ed25519.pem",
    "ca.key",
    "ca.pem",
)
_PURPOSE = "shared file"


class OtherMasterKey(Exception):
    """The database belongs to an installation with another master key."""


async def share_secrets(store: Store, vault: Vault, folder: Path) -> None:
    """Make the shared files in `folder` those of the database; the first replica's become everybody's.

    Raises OtherMasterKey before any file is touched.
    """
    agreed: dict[str, bytes] = {}
    for name in SHARED:
        sealed = await store.secret(name)
        if sealed is None:
            own = base64.b64encode((folder / name).read_bytes()).decode()
            sealed = await store.agree_on_secret(name, vault.seal(own, f"{_PURPOSE} {name}"))
        try:
            agreed[name] = base64.b64decode(vault.open(sealed, f"{_PURPOSE} {name}"))
        except CannotOpen as error:
            raise OtherMasterKey(
                "this database was set up with another master key: give this replica the first one's "
                f"(its master.key as {folder / 'master.key'}, or its text in COMFYFLEET_MASTER_KEY)"
            ) from error
    for name, content in agreed.items():
        path = folder / name
        if path.read_bytes() != content:
            log.info("secret.shared", file=name)
            _replace(path, content)


def _replace(path: Path, content: bytes) -> None:
    """Whole or not at all, readable by the owner only."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    draft.replace(path)
