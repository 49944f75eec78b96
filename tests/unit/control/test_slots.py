"""Ports of local workers: slot n has its own, a busy or claimed one moves on."""

from __future__ import annotations

import socket

from comfyfleet.control.fleet.slots import PortClaims, find_slot
from comfyfleet.testing.processes import free_port


def test_two_installations_that_look_at_the_same_moment_choose_different_ports(tmp_path):
    one, other = PortClaims(tmp_path), PortClaims(tmp_path)

    first = find_slot(0, (), one.claim)
    second = find_slot(0, (), other.claim)

    assert not first.ports & second.ports
    assert find_slot(0, (), one.claim) == first, "what this process claimed stays its own"


def test_a_claim_ends_with_its_process_and_a_listener_counts_without_one(tmp_path):
    claims, port = PortClaims(tmp_path), free_port()

    assert claims.claim(port)
    assert not PortClaims(tmp_path).claim(port)
    del claims
    with socket.create_server(("127.0.0.1", port)):
        assert not PortClaims(tmp_path).claim(port)
    assert PortClaims(tmp_path).claim(port)
