"""What arrived at an endpoint is remembered over a restart, so its fleet is not let go by one."""

from __future__ import annotations

import pytest

from comfyfleet.control.demand import LONG_S, Meters
from comfyfleet.control.records import DemandRow
from comfyfleet.control.store.store import open_sqlite

pytestmark = pytest.mark.anyio
NOW = 1_700_000_000.0


async def test_rates_are_the_same_after_a_restart(tmp_path):
    before = Meters()
    for second in range(400):
        before.arrived(1, 100.0, NOW + second)
    before.arrived(2, 7.0, NOW)
    store = open_sqlite(tmp_path / "control.sqlite3")
    for row in before.take_changes():
        await store.put(row)
    await store.close()

    store = open_sqlite(tmp_path / "control.sqlite3")
    after = Meters()
    after.load(await store.all(DemandRow))
    await store.close()

    assert after.rates(1, NOW + 400).long == pytest.approx(100.0, rel=0.02)
    for now in (NOW + 400, NOW + 500, NOW + 2000):
        assert after.rates(1, now) == before.rates(1, now)
    assert after.rates(2, NOW + 400).last_arrival_at == NOW


def test_only_what_changed_is_saved_and_no_more_than_is_used():
    meters = Meters()
    for second in range(1000):
        meters.arrived(1, 1.0, NOW + second)

    (row,) = meters.take_changes()

    assert len(row.buckets) <= LONG_S + 2
    assert meters.take_changes() == []
    meters.arrived(1, 1.0, NOW + 1001)
    meters.forget(1)
    assert meters.take_changes() == []
