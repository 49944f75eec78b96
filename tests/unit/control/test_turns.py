"""Whose turn it is on the way to a worker: fair between keys, and a key over its limits waits instead of failing."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyfleet.control.demand import Meters
from comfyfleet.control.limits import DAY_S, Allowance, Limits
from comfyfleet.control.placements import Placed, Waits
from comfyfleet.control.records import ApiKey, KeyLimits
from comfyfleet.control.route_queue import Phase, RouteQueue, RouteTicket
from comfyfleet.control.router import Want
from comfyfleet.control.turns import Turns
from comfyfleet.control.worker import Worker
from comfyfleet.control.worker_states import WorkerState
from comfyfleet.control.workers import Workers
from support.routing_world import RoutingWorld

pytestmark = pytest.mark.anyio


class Line:
    """Lines of one endpoint before workers that do a job at once when asked to; no clock but `now`."""

    def __init__(self, scores: list[float], limits: dict[str, KeyLimits] | None = None) -> None:
        self.limits = Limits()
        self.queue, self.workers = RouteQueue(), Workers()
        known = limits or {}
        allowance = Allowance(self.limits, lambda scope: known.get(scope, KeyLimits()))
        self.turns = Turns(queue=self.queue, workers=self.workers, allowance=allowance, meters=Meters())
        self.turns.asked(1, 0.0)  # a worker with anything to do is full
        for number, score in enumerate(scores, 1):
            worker = Worker(
                id=number,
                endpoint_id=1,
                group_id=0,
                mtoken="t",
                created_at=0.0,
                state=WorkerState.IDLE,
                url="http://w",
                measured_perf=score,
                last_report_at=0.0,
            )
            self.workers.add(worker, 0.0)
        self._numbers = 0
        self.running: dict[int, RouteTicket] = {}

    def add(self, scope: str, cost: float = 100.0, *, held: bool = False) -> RouteTicket:
        self._numbers += 1
        ticket = RouteTicket(
            request_idx=self._numbers,
            endpoint_id=1,
            scope=scope,
            want=Want(cost),
            shape="",
            order=self._numbers,
            arrived_at=0.0,
            polled_at=0.0,
            replay_timeout=1e9,
            held=held,
        )
        self.queue.add(ticket)
        return ticket

    def serve(self, now: float = 0.0) -> list[RouteTicket]:
        """Those that got a worker now, in the order of their booking."""
        self.turns.serve(1, now)
        granted = []
        for worker_id in sorted(self.workers.ids_of(1)):
            for request_idx in self.workers.load(worker_id).requests():
                ticket = self.queue.get(request_idx)
                if ticket is not None and ticket.phase is Phase.GRANTED:
                    self.queue.leave(ticket, Phase.ASSIGNED, worker_id, now)
                    self.running[worker_id] = ticket
                    granted.append(ticket)
        return granted

    def end(self, worker_id: int, now: float = 0.0) -> RouteTicket | None:
        ticket = self.running.pop(worker_id, None)
        if ticket is not None:
            self.workers.load(worker_id).finish(ticket.request_idx, now)
            self.queue.leave(ticket, Phase.FINISHED, worker_id, now)
        return ticket


def test_a_key_that_floods_the_line_takes_no_more_gpu_time_than_one_that_sends_a_little():
    line = Line([1.0])
    for _ in range(500):
        line.add("key:flood", cost=30.0)
    for _ in range(10):
        line.add("key:few", cost=90.0)

    order = []
    for _ in range(40):
        order += [ticket.scope for ticket in line.serve()]
        line.end(1)

    assert Counter(order) == {"key:flood": 30, "key:few": 10}, "30 x 30 s against 10 x 90 s"


def test_durable_jobs_and_routed_requests_of_a_key_stand_in_one_account():
    line = Line([1.0])
    for _ in range(100):
        line.add("key:both")
        line.add("key:both", held=True)
        line.add("key:other")

    order = []
    for _ in range(60):
        order += [ticket.scope for ticket in line.serve()]
        line.end(1)

    assert Counter(order) == {"key:both": 30, "key:other": 30}


@settings(max_examples=60, deadline=None)
@given(
    keys=st.lists(st.tuples(st.floats(0.5, 4.0), st.floats(1.0, 300.0)), min_size=2, max_size=5),
    scores=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=1, max_size=3),
    ends=st.lists(st.integers(0, 2), min_size=20, max_size=120),
)
def test_nobody_starves_whatever_the_weights_the_costs_and_the_speeds(keys, scores, ends):
    """Keys that always have something waiting stay within one job of each other, by weight, at every moment."""
    names = [f"key:{number}" for number in range(len(keys))]
    limits = {name: KeyLimits(weight=weight) for name, (weight, _) in zip(names, keys, strict=True)}
    line = Line(scores, limits)
    costs = dict(zip(names, (cost for _, cost in keys), strict=True))
    for name in names:
        for _ in range(len(ends) + 3):
            line.add(name, costs[name])
    given_s = Counter()
    slowest = min(scores)
    for end in ends:
        for ticket in line.serve():
            given_s[ticket.scope] += ticket.want.cost / line.workers.load(ticket.worker_id).score
        for one in names:
            for other in names:
                ahead = given_s[one] / limits[one].weight - given_s[other] / limits[other].weight
                largest = costs[one] / limits[one].weight + costs[other] / limits[other].weight
                assert ahead <= largest / slowest + 1e-6
        line.end(end % len(scores) + 1)


@settings(max_examples=40, deadline=None)
@given(arrivals=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), min_size=1, max_size=80))
def test_every_request_is_served_and_a_keys_own_in_the_order_of_arrival(arrivals):
    line = Line([1.0])
    wanted: dict[str, deque[int]] = {name: deque() for name in "abc"}
    for name, cost in arrivals:
        wanted[name].append(line.add(name, float(cost)).request_idx)
    for _ in arrivals:
        (ticket,) = line.serve()
        assert wanted[ticket.scope].popleft() == ticket.request_idx
        line.end(1)
    assert not any(wanted.values())


async def a_world_with_a_key(tmp_path, **limits) -> RoutingWorld:
    world = RoutingWorld(tmp_path, cold_workers=0)
    world.keys.put(ApiKey(id="a", name="a", digest="d", scopes=("route",), limits=KeyLimits(**limits)))
    await world.__aenter__()
    worker = await world.plane.lifecycle.register(1, 0)
    world.report(worker.id, score=1000.0)
    return world


async def test_a_key_over_its_rate_waits_and_is_told_why_while_another_goes_on(tmp_path):
    world = await a_world_with_a_key(tmp_path, requests_per_s=0.5, burst=1)
    first, second = world.ask(), world.ask()
    other = world.ask(scope="key:b")

    assert isinstance(first, Placed)
    assert isinstance(other, Placed)
    assert isinstance(second, Waits)
    assert "0.5 requests a second" in second.answer.reason
    assert second.retry_after_s == pytest.approx(2.0)
    assert second.answer.request_idx > 0
    await world.tick(2.1)
    assert isinstance(world.ask(second.answer.request_idx), Placed), "it kept its place and needs no second request"
    await world.__aexit__(None, None, None)


async def test_a_key_out_of_its_days_gpu_seconds_waits_until_they_come_back(tmp_path):
    world = await a_world_with_a_key(tmp_path, gpu_seconds_per_day=10.0)
    placed = world.ask()
    world.clock.jump(20.0)
    world.report(1, score=1000.0, working=(placed.answer.request_idx,))
    world.finish(1, placed.answer.request_idx, seconds=15.0)
    waits = world.ask(replay_timeout=2 * DAY_S)

    assert isinstance(waits, Waits)
    assert "10 GPU-seconds of the last 24 hours" in waits.answer.reason
    world.clock.jump(DAY_S)
    world.report(1, score=1000.0)
    assert isinstance(world.ask(waits.answer.request_idx), Placed)
    await world.__aexit__(None, None, None)


async def test_a_key_may_have_so_many_waiting_and_those_beyond_come_in_later_under_their_number(tmp_path):
    world = await a_world_with_a_key(tmp_path, max_waiting_jobs=2)
    await world.tick(31.0)  # nobody is ready now
    waiting = [world.ask() for _ in range(3)]

    assert "2 requests waiting" in waiting[2].answer.reason
    assert world.plane.desk.queue.waiting_count(1) == 2
    world.report(1, score=1000.0)
    assert isinstance(world.ask(waiting[2].answer.request_idx), Placed)
    await world.__aexit__(None, None, None)


async def test_no_fleet_is_grown_for_requests_that_a_keys_limit_holds_back(tmp_path):
    world = await a_world_with_a_key(tmp_path, requests_per_s=0.5, burst=1)
    for _ in range(200):
        world.ask()

    demand = world.plane.desk.demand(1)

    assert demand.waiting == 5, "what the key may send in ten seconds"
    assert demand.rates.short <= 100.0 / 15.0, "one request has gone"
    await world.__aexit__(None, None, None)
