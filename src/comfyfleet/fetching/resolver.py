"""Resolve, check, pin: a resolver for aiohttp that gives only addresses we may connect to.

aiohttp connects to exactly the addresses that a resolver gives it, so what was checked is what is used: a name that
answers differently a moment later (rebinding) is asked again, and checked again, on the next connection. A name with
one refused address is refused whole. Literal addresses never reach a resolver; `check_host` covers those.
"""

from __future__ import annotations

import socket

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from comfyfleet.fetching.addresses import AddressRules, parse_address
from comfyfleet.wire.errors import InputRefused


class GuardedResolver(AbstractResolver):
    """Asks `inner` (the system's resolver by default) and refuses by `rules`."""

    def __init__(self, rules: AddressRules, inner: AbstractResolver | None = None) -> None:
        self._rules = rules
        self._inner = inner if inner is not None else ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The checked addresses of `host`. Raises InputRefused, or OSError when the name is unknown."""
        found = await self._inner.resolve(host, port, family)
        for result in found:
            address = parse_address(result["host"])
            if address is None:
                raise OSError(f"{host} resolved to no address")
            self._rules.check(host, address)
        return found

    async def close(self) -> None:
        await self._inner.close()


def check_host(rules: AddressRules, host: str) -> None:
    """Check a host that may be a literal address; a name passes here and is checked when it is resolved.

    What only looks like an address (`127.1`, `2130706433`, `0x7f.1`) is refused: HTTP clients take some of these for
    literals, skip the resolver, and leave it to the system to make 127.0.0.1 of them.
    """
    address = parse_address(host)
    if address is not None:
        rules.check(host, address)
    elif ":" in host or ends_in_number(host):
        raise InputRefused(f"{host} is no host name", host=host, reason="address_refused")


def ends_in_number(host: str) -> bool:
    """The WHATWG URL standard's test for a host that is meant as an IPv4 address, in whatever notation."""
    last = host.rstrip(".").rpartition(".")[2].lower()
    return last.isdigit() or (last.startswith("0x") and all(digit in "0123456789abcdef" for digit in last[2:]))
