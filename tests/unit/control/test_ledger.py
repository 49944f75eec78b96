"""What is paid for what: a ready worker for its GPU, an inactive one for its storage, a key for what it used."""

from __future__ import annotations

import pytest

from comfyfleet.control.job_run import RunOutcome
from comfyfleet.control.ledger import Ledger, billed_as, merged
from comfyfleet.control.records import UsageRow
from comfyfleet.control.worker_states import WorkerState
from comfyfleet.wire.jobs import JobStatus
from support.routing_world import RoutingWorld
from support.stored_jobs import a_job

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("states", "kind"),
    [
        ("idle loading model_loading starting rebooting update_ready update_rebooting update_starting", "gpu"),
        ("creating created stopping stopped", "storage"),
        ("pending error destroying", ""),
    ],
)
def test_each_state_has_the_documents_price(states, kind):
    assert {billed_as(WorkerState(state)) for state in states.split()} == {kind}


async def test_idle_time_is_paid_and_a_sleeping_worker_costs_its_storage_only(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=0) as world:
        ledger = a_ledger(world)
        worker = await world.plane.lifecycle.register(1, 0)
        world.report(worker.id)
        ledger.count()
        world.clock.jump(1800.0)
        ledger.count()
        world.plane.workers.move(worker.id, WorkerState.STOPPING, world.clock.now())
        world.plane.workers.move(worker.id, WorkerState.STOPPED, world.clock.now())
        ledger.count()
        world.clock.jump(3600.0)
        ledger.count()
        await ledger.flush()
        sums = {row.kind: row for row in await world.store.usage(since=0.0, until=world.clock.now())}

        assert (sums["gpu"].seconds, sums["gpu"].price) == (1800.0, pytest.approx(1.0))
        assert (sums["storage"].seconds, sums["storage"].price) == (3600.0, pytest.approx(0.1))


async def test_a_routed_request_is_on_its_keys_account_and_the_quota_knows_it_after_a_restart(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=0) as world:
        ledger = a_ledger(world)
        world.plane.reports.used = ledger.request_ended
        worker = await world.plane.lifecycle.register(1, 0)
        world.report(worker.id, score=1000.0)
        for _ in range(3):
            placed = world.ask(scope="key:a")
            world.clock.jump(20.0)
            world.report(worker.id, score=1000.0, working=(placed.answer.request_idx,))
            world.finish(worker.id, placed.answer.request_idx, seconds=15.0)
        await ledger.flush()
        (row,) = [row for row in await world.store.usage(since=0.0, until=world.clock.now()) if row.scope == "key:a"]

        assert (row.kind, row.seconds) == ("request", 45.0)
        assert world.plane.limits.quota_wait_s("key:a", 40.0, world.clock.now()) > 0
        await world.restart()
        assert world.plane.limits.quota_wait_s("key:a", 40.0, world.clock.now()) == 0
        await a_ledger(world).load()
        assert world.plane.limits.quota_wait_s("key:a", 40.0, world.clock.now()) > 0


async def test_a_job_costs_what_its_workers_machine_costs(tmp_path):
    async with RoutingWorld(tmp_path, cold_workers=0) as world:
        ledger = a_ledger(world)
        worker = await world.plane.lifecycle.register(1, 0)
        world.plane.workers.change(worker.id, world.clock.now(), price_hour=7.2)
        for scope, worker_id in (("key:dear", worker.id), ("key:gone", 99)):
            job = a_job(scope=scope, worker_id=worker_id)
            ledger.job_ended(RunOutcome(job=job, status=JobStatus.COMPLETED, seconds=1800.0))
        await ledger.flush()
        prices = {row.scope: row.price for row in await world.store.usage(since=0.0, until=world.clock.now())}

        assert prices["key:dear"] == pytest.approx(3.6)
        assert prices["key:gone"] == pytest.approx(1.0)  # the settings' price


def test_rows_of_one_worker_and_one_key_are_summed_before_they_are_saved():
    def row(kind: str, scope: str, seconds: float) -> UsageRow:
        return UsageRow(
            endpoint_id=1,
            workergroup_id=1,
            worker_id=1,
            scope=scope,
            kind=kind,
            started_at=0.0,
            seconds=seconds,
            price=seconds,
        )

    rows = merged([row("request", "a", 1.0), row("request", "a", 2.0), row("request", "b", 4.0), row("gpu", "", 8.0)])

    assert sorted((one.kind, one.scope, one.seconds) for one in rows) == [
        ("gpu", "", 8.0),
        ("request", "a", 3.0),
        ("request", "b", 4.0),
    ]


def a_ledger(world: RoutingWorld) -> Ledger:
    return Ledger(
        store=world.store,
        workers=world.plane.workers,
        limits=world.plane.limits,
        clock=world.clock,
        price_gpu_hour=2.0,
        price_storage_hour=0.1,
    )
