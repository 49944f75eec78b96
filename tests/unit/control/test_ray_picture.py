"""What is known of a Ray cluster: over a restart, beside orders, and while it does not answer."""

from __future__ import annotations

import pytest

from comfyfleet.control.fleet.base import FleetNode, FleetWorker, Presence, WorkerSpec
from comfyfleet.control.fleet.events import EventLog
from comfyfleet.control.fleet.ray_node import NodeWorker, Reservation
from comfyfleet.control.fleet.ray_picture import HEAD_LOST_AFTER_S, Picture
from comfyfleet.control.fleet.ray_view import Look, NodeView, Placed
from comfyfleet.testing.clock import FakeClock

NODE = NodeView(id="n1", facts=FleetNode(name="n1", address="10.0.0.1", is_alive=True, gpus=2), is_heard=True)
RUNNING = Placed(
    node_id="n1",
    worker=NodeWorker(seen=FleetWorker(id=1, presence=Presence.RUNNING), reservation=Reservation(incarnation="i1")),
)
LOOK = Look(nodes=(NODE,), placed=(RUNNING,))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def events(clock) -> EventLog:
    return EventLog(clock)


@pytest.fixture
def picture(tmp_path, events, clock) -> Picture:
    return Picture(tmp_path / "ray-fleet.json", events, clock)


def kinds(events: EventLog) -> list[str]:
    return [event.kind for event in events.all()]


def test_workers_are_known_to_the_next_control_plane_before_its_cluster_answers(picture, tmp_path, events, clock):
    picture.answered(LOOK, picture.known())
    picture.keep()

    following = Picture(tmp_path / "ray-fleet.json", events, clock)

    assert following.known() == picture.known()
    assert [worker.presence for worker in following.workers()] == [Presence.RUNNING]
    assert following.trouble


def test_what_was_ordered_during_a_look_stands_until_the_next(picture):
    picture.answered(LOOK, picture.known())
    asked = picture.known()

    picture.stopped(asked[1])
    picture.answered(LOOK, asked)
    assert [worker.presence for worker in picture.workers()] == [Presence.STOPPED]

    picture.answered(LOOK, picture.known())
    assert [worker.presence for worker in picture.workers()] == [Presence.RUNNING]


def test_a_worker_that_is_placed_twice_in_one_life_keeps_what_was_seen_of_it(picture):
    picture.answered(LOOK, picture.known())
    before = picture.known()

    picture.placed(WorkerSpec(id=1, mtoken="m", incarnation="i1"))
    assert picture.known() == before

    picture.placed(WorkerSpec(id=1, mtoken="m", incarnation="i2"))
    assert picture.known()[1].incarnation == "i2"


def test_a_lost_head_is_said_once_and_only_after_a_while_and_workers_stay_known(picture, events, clock):
    picture.answered(LOOK, picture.known())

    picture.unanswered("refused")
    assert picture.trouble == ""

    clock.jump(HEAD_LOST_AFTER_S + 1.0)
    silent_s = [picture.unanswered("refused"), picture.unanswered("refused")]
    assert silent_s == [HEAD_LOST_AFTER_S + 1.0] * 2
    assert "nothing new starts" in picture.trouble
    assert [worker.presence for worker in picture.workers()] == [Presence.RUNNING]

    picture.wait_anew()
    assert picture.unanswered("refused") == 0.0
    picture.answered(LOOK, picture.known())
    assert picture.trouble == ""
    assert kinds(events) == ["head.joined", "node.joined", "worker.running", "head.lost", "head.joined"]
