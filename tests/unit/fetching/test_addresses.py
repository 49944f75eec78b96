"""Only public addresses are gone to, in whatever clothes a private one comes."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.fetching.addresses import AddressRules, is_public, parse_address
from comfyfleet.wire.errors import InputRefused

PRIVATE_V4 = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.2.0/24",
    "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4", "255.255.255.255/32",
]  # fmt: skip


@st.composite
def private_addresses(draw: st.DrawFn) -> IPv4Address:
    network = ip_network(draw(st.sampled_from(PRIVATE_V4)))
    return network[draw(st.integers(0, network.num_addresses - 1))]


def in_disguise(inner: IPv4Address) -> list[IPv6Address]:
    """The ways an IPv6 address can lead to an IPv4 one."""
    low = int(inner)
    return [
        IPv6Address(f"::ffff:{inner}"),
        IPv6Address(low),
        IPv6Address((0x0064FF9B << 96) | low),
        IPv6Address((0x0064FF9B0001 << 80) | low),
        IPv6Address((0x2002 << 112) | (low << 80) | 1),
        IPv6Address((0x20010000 << 96) | (int(IPv4Address("8.8.8.8")) << 64) | (low ^ 0xFFFFFFFF)),
    ]


@given(inner=private_addresses())
def test_a_private_address_is_refused_bare_and_in_every_disguise(inner: IPv4Address) -> None:
    assert not is_public(inner)
    assert not any(is_public(outer) for outer in in_disguise(inner))


@given(address=st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_whatever_is_public_is_globally_routable_unicast(address: IPv4Address | IPv6Address) -> None:
    if is_public(address):
        assert address.is_global
        assert not address.is_multicast
        assert not address.is_loopback
        assert not address.is_link_local


@pytest.mark.parametrize("text", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001:82a::200e"])
def test_the_internet_is_public(text: str) -> None:
    assert is_public(ip_address(text))


@pytest.mark.parametrize(
    "text",
    [
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12::1",
        "fec0::1",
        "ff02::1",
        "2001:db8::1",
        "64:ff9b:1::808:808",
    ],
)
def test_what_is_not_the_internet_is_not(text: str) -> None:
    assert not is_public(ip_address(text))


def test_the_operator_may_allow_a_name_an_address_or_a_network() -> None:
    rules = AddressRules.parse(["MinIO.lan.", "10.1.0.0/16", "[::1]", " ", "192.168.1.7"])

    assert rules.allows("minio.lan", ip_address("10.9.9.9"))
    assert rules.allows("anything", ip_address("10.1.2.3"))
    assert rules.allows("anything", ip_address("::ffff:10.1.2.3"))
    assert rules.allows("anything", ip_address("::1"))
    assert not rules.allows("minio.lan.evil.test", ip_address("10.9.9.9"))
    assert not rules.allows("anything", ip_address("192.168.1.8"))
    with pytest.raises(InputRefused) as refusal:
        rules.check("cat.test", ip_address("192.168.1.8"))
    assert "192.168" not in refusal.value.message


@pytest.mark.parametrize("entry", ["10.0.0.0/99", "http://minio", "a b"])
def test_an_entry_that_is_nothing_of_the_kind_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match="neither"):
        AddressRules.parse([entry])


def test_a_literal_host_is_an_address_and_a_name_is_not() -> None:
    assert parse_address("[::1]") == ip_address("::1")
    assert parse_address("cats.example") is None
