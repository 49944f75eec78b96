"""What a driver says about a card, by the names that users know; a machine without one has no cards."""

from __future__ import annotations

from comfyfleet.gpu import throttling_of


def test_reasons_that_hold_clocks_down_have_names():
    assert throttling_of(0x20 | 0x4) == ("sw_power_cap", "sw_thermal")


def test_an_idle_card_is_not_throttled():
    assert throttling_of(0x1) == ()
