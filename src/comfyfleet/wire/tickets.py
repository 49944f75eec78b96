"""Our ticket: a compact JWS (EdDSA) that binds one request to one worker; it stands beside the compatible `signature`.

Claims, all demanded: `url`, `endpoint`, `cost`, `reqnum`, `request_idx`, `exp` (epoch s) and `sub` (the calling key's
scope, so that one key's results are invisible to another). Signing is in `control.tickets`, checking in
`worker.tickets`; both share only these names. The public key is served at `/pubkey/ed25519` as PEM.
"""

from __future__ import annotations

import msgspec

ALGORITHM = "EdDSA"
TYPE = "comfyfleet-ticket+jwt"


class TicketClaims(msgspec.Struct, frozen=True, kw_only=True):
    """What a ticket says. incarnation: the worker's, "" where the fleet does not fence."""

    url: str
    endpoint: str
    cost: float
    reqnum: int
    request_idx: int
    exp: float
    sub: str
    incarnation: str = ""
