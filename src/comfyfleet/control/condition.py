"""How a control plane is, as `/health` tells it. Made by whoever knows a part of it; it decides nothing itself."""

from __future__ import annotations

from typing import Any

import msgspec


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """why_unfit: why a load balancer should send nobody here now, "" while it may. facts: what more there is to say."""

    why_unfit: str = ""
    facts: dict[str, Any] = {}
