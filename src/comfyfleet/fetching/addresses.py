"""May we connect there? Pure decisions about addresses; no name is resolved here.

An address is public when the internet can route to it *and* no IPv4 address hidden inside it (mapped, compatible,
NAT64, 6to4, Teredo) is private. Everything else needs an entry in the operator's allow-list: a host name, an address,
or a network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from comfyfleet.wire.errors import InputRefused

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# RFC 6052 and RFC 8215: the last 32 bits are an IPv4 address (we take only /96 embeddings for public ones).
_NAT64 = IPv6Network("64:ff9b::/96")
_NAT64_LOCAL = IPv6Network("64:ff9b:1::/48")
# RFC 4291 2.5.5.1, deprecated: ::a.b.c.d.
_COMPATIBLE = IPv6Network("::/96")
# RFC 8215, discard-only, documentation and the SRv6 range are not global unicast; Python 3.11 knows most of them.
_SITE_LOCAL = IPv6Network("fec0::/10")


def parse_address(text: str) -> Address | None:
    """The address a literal host stands for (`127.0.0.1`, `::1`, `[::1]`), or None for a name."""
    try:
        return ip_address(text.strip("[]"))
    except ValueError:
        return None


def hidden_addresses(address: Address) -> Iterator[Address]:
    """The IPv4 addresses that a packet to this IPv6 address may end up at."""
    if isinstance(address, IPv4Address):
        return
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if address in _NAT64 or address in _NAT64_LOCAL or address in _COMPATIBLE:
        yield IPv4Address(int(address) & 0xFFFFFFFF)


def is_public(address: Address) -> bool:
    """True for a globally routable unicast address that hides no private one."""
    if isinstance(address, IPv6Address):
        if address.scope_id is not None or address in _SITE_LOCAL or address in _NAT64_LOCAL:
            return False
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
    if not address.is_global or address.is_multicast or address.is_reserved or address.is_unspecified:
        return False
    return all(is_public(inner) for inner in hidden_addresses(address))


@dataclass(frozen=True, kw_only=True)
class AddressRules:
    """Public addresses, and what the operator allows besides: exact host names, and networks."""

    allowed_hosts: frozenset[str] = frozenset()
    allowed_networks: tuple[Network, ...] = ()

    @classmethod
    def parse(cls, entries: Iterable[str]) -> AddressRules:
        """From `minio.lan`, `10.1.2.3`, `10.0.0.0/8`, `[::1]`. Raises ValueError for what is none of these."""
        hosts, networks = set(), []
        for entry in entries:
            text = entry.strip().strip("[]").rstrip(".").lower()
            if not text:
                continue
            try:
                networks.append(ip_network(text, strict=False))
            except ValueError:
                if "/" in text or ":" in text or " " in text:
                    raise ValueError(f"{entry!r} is neither a host name, an address nor a network") from None
                hosts.add(text)
        return cls(allowed_hosts=frozenset(hosts), allowed_networks=tuple(networks))

    @classmethod
    def anywhere(cls) -> AddressRules:
        """For what the operator set himself: his own network is his to use."""
        return cls(allowed_networks=(IPv4Network("0.0.0.0/0"), IPv6Network("::/0")))

    def allows(self, host: str, address: Address) -> bool:
        """Whether a connection to `address`, asked for under the name `host`, may be made."""
        if host.strip("[]").rstrip(".").lower() in self.allowed_hosts:
            return True
        if is_public(address):
            return True
        mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
        return any((mapped or address) in network for network in self.allowed_networks)

    def check(self, host: str, address: Address) -> None:
        """Raises InputRefused unless `allows`. The message does not say what the name resolved to."""
        if not self.allows(host, address):
            raise InputRefused(f"{host} is not a public address", host=host, reason="address_refused")
