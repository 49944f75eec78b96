"""What every fleet provider keeps to: processes on this machine, and the fake that tests use."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from importlib.util import find_spec

import anyio
import psutil
import pytest

from comfyfleet.clock import SystemClock
from comfyfleet.control.fleet.base import FleetWorker, NoCapacity, Presence, WorkerSpec
from comfyfleet.control.fleet.local import LocalFleet, LocalSettings
from comfyfleet.testing.fleet import FakeFleet
from comfyfleet.wire.errors import NotFound
from support.ray_cluster import ray_cluster

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

# A worker that says hello, has an engine of its own, and leaves on SIGTERM unless told to be stubborn.
SCRIPT = """
import os, signal, subprocess, sys, time
if os.environ.get("STUBBORN"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("hello from", os.environ["CONTAINER_ID"], os.environ["WORKER_PORT"], flush=True)
if os.environ.get("CRASH"):
    child.kill()
    sys.exit(3)
time.sleep(60)
"""


def local_fleet(folder, slots: int = 2) -> LocalFleet:
    return LocalFleet(
        LocalSettings(
            data_dir=folder,
            report_url="http://127.0.0.1:9",
            slots=slots,
            base_environment={"PATH": os.environ["PATH"]},
            command=(sys.executable, "-c", SCRIPT),
        ),
        SystemClock(),
    )


@pytest.fixture(params=["local", "fake"])
async def fleet(request, tmp_path):
    fleet = local_fleet(tmp_path) if request.param == "local" else FakeFleet(SystemClock(), slots=2)
    yield fleet
    await fleet.close(keep_running=False)


def spec(worker_id: int, **environment: str) -> WorkerSpec:
    return WorkerSpec(id=worker_id, mtoken="secret", incarnation=f"i{worker_id}", environment=environment)


async def presence(fleet, worker_id: int) -> Presence | None:
    return next((worker.presence for worker in await fleet.list() if worker.id == worker_id), None)


async def test_a_worker_exists_from_create_to_destroy_and_keeps_its_id_while_stopped(fleet):
    await fleet.create(spec(1))
    created = await presence(fleet, 1)
    await fleet.stop(1)
    stopped = await presence(fleet, 1)
    await fleet.start(spec(1))
    started = await presence(fleet, 1)
    await fleet.destroy(1)

    assert (created, stopped, started) == (Presence.RUNNING, Presence.STOPPED, Presence.RUNNING)
    assert await presence(fleet, 1) is None


async def test_every_call_may_be_repeated(fleet):
    await fleet.create(spec(1))
    await fleet.create(spec(1))
    await fleet.start(spec(1))
    assert len(await fleet.list()) == 1

    await fleet.stop(1)
    await fleet.stop(1)
    await fleet.drain(1)
    await fleet.destroy(1)
    await fleet.destroy(1)
    await fleet.stop(1)

    assert await fleet.list() == []


async def test_a_full_fleet_says_so_and_makes_nothing(fleet):
    assert fleet.capacity in (2, None), "two, or nobody can tell beforehand"
    await fleet.create(spec(1))
    await fleet.create(spec(2))

    with pytest.raises(NoCapacity):
        await fleet.create(spec(3))

    assert sorted(worker.id for worker in await fleet.list()) == [1, 2]


async def test_starting_a_worker_that_does_not_exist_is_refused(fleet):
    with pytest.raises(NotFound):
        await fleet.start(spec(7))


async def test_logs_are_the_last_lines_and_nothing_for_a_stranger(fleet):
    await fleet.create(spec(1))
    with anyio.fail_after(60):
        while not await fleet.logs(1, 10):  # noqa: ASYNC110 - the process writes them
            await anyio.sleep(0.05)

    assert (await fleet.logs(1, 1)).count("\n") == 1
    assert await fleet.logs(1, 0) == ""
    assert await fleet.logs(99, 10) == ""


async def test_a_fleet_tells_its_machines_and_what_happened(fleet):
    await fleet.create(spec(1))

    nodes = await fleet.nodes()

    assert sum(node.gpus for node in nodes if node.is_alive) == 2
    assert fleet.trouble == ""
    assert all(event.kind and event.at for event in fleet.events())


CONTRACT = (
    test_a_worker_exists_from_create_to_destroy_and_keeps_its_id_while_stopped,
    test_every_call_may_be_repeated,
    test_a_full_fleet_says_so_and_makes_nothing,
    test_starting_a_worker_that_does_not_exist_is_refused,
    test_logs_are_the_last_lines_and_nothing_for_a_stranger,
    test_a_fleet_tells_its_machines_and_what_happened,
)


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
async def test_workers_on_a_ray_cluster_keep_the_same_contract_and_their_processes_outlive_the_actors(tmp_path):
    """One cluster for all of it: starting one takes as long as the promises."""
    with ray_cluster({"a": 2}) as cluster:
        fleet = cluster.fleet(tmp_path, command=(sys.executable, "-c", SCRIPT))
        try:
            for promise in CONTRACT:
                await promise(fleet)
                for worker in await fleet.list():
                    await fleet.destroy(worker.id, grace_s=1.0)

            await fleet.create(spec(8, CRASH="1"))
            with anyio.fail_after(60):
                while (found := await one(fleet, 8)).exit_code is None:  # noqa: ASYNC110
                    await anyio.sleep(0.1)
            assert (found.presence, found.exit_code) == (Presence.EXITED, 3)
            await fleet.destroy(8)

            await fleet.create(spec(9, STUBBORN="1"))
            with anyio.fail_after(60):
                while "hello" not in await fleet.logs(9, 5):  # noqa: ASYNC110
                    await anyio.sleep(0.1)
            family = owned(cluster.disk("a") / "workers" / "9")
            await fleet.stop(9, grace_s=0.3)
            _, alive = psutil.wait_procs(family, timeout=20)
            assert len(family) >= 2
            assert alive == []
            await fleet.destroy(9)

            await asks_the_cluster_for_room(fleet, cluster)
        finally:
            await fleet.close(keep_running=False)


async def asks_the_cluster_for_room(fleet, cluster) -> None:
    """Ray's autoscaler is told of what runs and of what was refused, and no longer of what has ended."""

    async def until_wanted(*possible: list[dict]) -> None:
        wanted = None
        with anyio.move_on_after(60):
            while (wanted := await anyio.to_thread.run_sync(cluster.wanted)) not in possible:  # noqa: ASYNC110
                await anyio.sleep(0.2)
        assert wanted in possible

    one_gpu = {"GPU": 1.0}
    await fleet.create(spec(11))
    await fleet.create(spec(12))
    with pytest.raises(NoCapacity):
        await fleet.create(spec(13))
    await until_wanted([one_gpu, one_gpu, one_gpu])

    await fleet.destroy(11, grace_s=1.0)
    await fleet.destroy(12, grace_s=1.0)
    await until_wanted([one_gpu], [])  # a refusal is forgotten after a while


async def test_a_local_worker_that_ends_by_itself_is_seen_with_its_exit_code(tmp_path):
    fleet = local_fleet(tmp_path)
    await fleet.create(spec(1, CRASH="1"))
    with anyio.fail_after(60):
        while await presence(fleet, 1) is Presence.RUNNING:  # noqa: ASYNC110
            await anyio.sleep(0.05)

    (found,) = await fleet.list()
    await fleet.close(keep_running=False)

    assert (found.presence, found.exit_code, found.detail) == (Presence.EXITED, 3, "exited with code 3")


async def test_a_stubborn_local_worker_and_its_engine_are_gone_after_a_stop(tmp_path):
    fleet = local_fleet(tmp_path)
    await fleet.create(spec(1, STUBBORN="1"))
    with anyio.fail_after(60):
        while "hello" not in await fleet.logs(1, 5):  # noqa: ASYNC110
            await anyio.sleep(0.05)
    family = owned(tmp_path / "workers" / "1")
    assert len(family) == 2

    await fleet.stop(1, grace_s=0.3)

    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []


async def test_the_next_control_plane_takes_local_workers_over_and_can_end_them(tmp_path):
    before = local_fleet(tmp_path)
    await before.create(spec(1))
    await before.close(keep_running=True)
    family = owned(tmp_path / "workers" / "1")

    after = local_fleet(tmp_path)
    seen = await presence(after, 1)
    await after.destroy(1, grace_s=5.0)

    assert seen is Presence.RUNNING
    assert not (tmp_path / "workers" / "1").exists()
    with contextlib.suppress(ChildProcessError):
        os.waitpid(family[0].pid, os.WNOHANG)  # noqa: ASYNC222 - does not block
    assert all(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in family)


async def test_a_foreign_process_with_a_recorded_pid_is_never_touched(tmp_path):
    fleet = local_fleet(tmp_path)
    await fleet.create(spec(1))
    await fleet.stop(1)
    stranger = await anyio.open_process([sys.executable, "-c", "import time; time.sleep(60)"])
    record = tmp_path / "workers" / "1" / "local.json"
    started = psutil.Process(stranger.pid).create_time()
    text = record.read_text().replace('"pid":0', f'"pid":{stranger.pid}')
    record.write_text(text.replace('"process_started":0.0', f'"process_started":{started}'))

    seen = await presence(fleet, 1)
    await fleet.destroy(1, grace_s=0.2)
    lives = stranger.returncode is None and psutil.Process(stranger.pid).status() != psutil.STATUS_ZOMBIE
    stranger.send_signal(signal.SIGKILL)
    await stranger.aclose()

    assert seen is Presence.EXITED, "its pid lives, but it is not ours: no folder of ours in its environment"
    assert lives


async def one(fleet, worker_id: int) -> FleetWorker:
    return next(worker for worker in await fleet.list() if worker.id == worker_id)


def owned(folder) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("COMFYFLEET_WORKER_DIR") == str(folder):
                found.append(process)
    return found
