"""The simulator: it conserves work, tells what a fleet costs, and drives the very functions of the control plane."""

from __future__ import annotations

import itertools
import json

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyfleet.cli.simulate import command
from comfyfleet.control.scaling import ScalePolicy
from comfyfleet.control.simulator.files import FleetFile, GpuKind, read_endpoint, read_fleet
from comfyfleet.control.simulator.simulation import Simulation
from comfyfleet.control.simulator.strategies import FixedFleet, KnativeConcurrency, OurAutoscaler
from comfyfleet.control.simulator.summary import clairvoyant, percentiles, summarise
from comfyfleet.control.simulator.trace import GENERATORS, Arrival, read_trace, write_trace
from comfyfleet.wire.errors import BadRequest

FLEET = FleetFile(gpu=(GpuKind(name="a", score=2.0, boot_s=60.0, wake_s=10.0, swap_s=5.0, count=10),))
POLICY = ScalePolicy(endpoint_id=1, cold_workers=0, max_workers=10, cold_mult=1.0)


def play(arrivals, strategy=None, *, policy=POLICY, fleet=FLEET, affinity=True):
    simulation = Simulation(policy=policy, fleet=fleet, strategy=strategy or OurAutoscaler(), affinity=affinity)
    return summarise("run", simulation.run(arrivals), with_decisions=True)


def test_one_request_waits_for_a_start_and_a_model_and_costs_exactly_its_time():
    run = play([Arrival(0.5, 20.0, "wan")])

    # It arrives at 0.5; the next decision, at 1.0, starts a worker: 60 s of start, 5 s of model, 10 s of work.
    assert run.wait_s["max"] == pytest.approx(0.5 + 60.0 + 5.0)
    assert run.latency_s["max"] == pytest.approx(0.5 + 60.0 + 5.0 + 10.0)
    assert (run.gpu_s["busy"], run.gpu_s["swap"], run.gpu_s["booting"]) == (10.0, 5.0, 60.0)
    assert run.swaps == 1
    assert run.decisions[0].sentence.startswith("Create 1 worker: 1 request waits")


@pytest.mark.parametrize("strategy", [OurAutoscaler, lambda: KnativeConcurrency(1.0), lambda: FixedFleet(3)])
def test_every_policy_serves_every_request_and_pays_for_every_second_of_work(strategy):
    arrivals = [Arrival(number * 3.0, 4.0, f"m{number % 3}") for number in range(200)]

    run = play(arrivals, strategy())

    assert (run.requests, run.unserved) == (200, 0)
    assert run.gpu_s["busy"] == pytest.approx(200 * 4.0 / 2.0)
    assert run.gpu_s["total"] >= clairvoyant(arrivals, FLEET).gpu_s["busy"]


def test_knowing_the_models_saves_swaps():
    arrivals = [Arrival(number * 1.5, 4.0, f"m{number % 4}") for number in range(300)]

    with_models, without = play(arrivals, FixedFleet(5)), play(arrivals, FixedFleet(5), affinity=False)

    assert with_models.swaps < without.swaps / 2
    assert with_models.latency_s["mean"] < without.latency_s["mean"]


def test_an_idle_fleet_goes_to_zero_and_the_same_run_gives_the_same_result():
    arrivals = [Arrival(0.0, 4.0), Arrival(1000.0, 4.0)]

    one, again = play(arrivals), play(arrivals)

    assert one.gpu_s["idle"] < 200.0
    assert one == again


@settings(max_examples=25, deadline=None)
@given(
    gaps=st.lists(st.floats(0.0, 60.0), min_size=1, max_size=60),
    work=st.lists(st.floats(0.1, 60.0), min_size=60, max_size=60),
)
def test_nobody_starves_and_nobody_is_served_twice(gaps, work):
    arrivals, now = [], 0.0
    for number, gap in enumerate(gaps):
        now += gap
        arrivals.append(Arrival(now, work[number], f"m{number % 3}", f"key{number % 4}"))

    run = play(arrivals)

    assert (run.requests, run.unserved) == (len(arrivals), 0)
    assert run.workers_created <= POLICY.max_workers
    # Nobody waits longer than a start plus everybody's work and swaps on one machine.
    assert run.wait_s["max"] <= 61.0 + sum(a.work_s for a in arrivals) / 2.0 + 5.0 * len(arrivals) + 1.0


def test_a_light_tenant_is_not_starved_by_a_heavy_one():
    heavy = [Arrival(100.0, 6.0, "wan", "heavy") for _ in range(400)]
    light = [Arrival(200.0 + number * 40.0, 6.0, "wan", "light") for number in range(10)]
    arrivals = sorted([*heavy, *light])

    run = play(arrivals, FixedFleet(2))
    one_line = play([arrival._replace(tenant="all") for arrival in arrivals], FixedFleet(2))

    assert (run.tenants["heavy"].requests, run.tenants["light"].requests, run.unserved) == (400, 10, 0)
    # What a worker has booked already (max_queue_time) comes first, and one job that the turn may have gone to.
    assert run.tenants["light"].wait_s["max"] <= POLICY.max_queue_time + 2 * 3.0 + 1.0
    assert run.tenants["heavy"].wait_s["max"] == pytest.approx(600.0, rel=0.15)
    assert one_line.wait_s["mean"] == pytest.approx(run.wait_s["mean"], rel=0.05)
    assert one_line.tenants == {}


def test_two_tenants_that_wait_get_the_same_gpu_time_not_the_same_number_of_jobs():
    long = [Arrival(0.0, 20.0, "", "long") for _ in range(30)]
    short = [Arrival(0.0, 2.0, "", "short") for _ in range(300)]

    run = play([*long, *short], FixedFleet(2))

    # 600 load units each: both lines end when everything ends.
    assert run.tenants["long"].wait_s["max"] == pytest.approx(run.tenants["short"].wait_s["max"], rel=0.1)


def test_one_tenant_by_whatever_name_is_one_plain_line():
    arrivals = list(GENERATORS["bursty"](hours=0.5))

    assert play([arrival._replace(tenant="") for arrival in arrivals]) == play(
        [arrival._replace(tenant="key1") for arrival in arrivals]
    )


def test_the_command_reads_its_files_and_writes_the_decisions(tmp_path):
    trace, endpoint, fleet, out = (tmp_path / name for name in ("t.csv", "e.toml", "f.toml", "o.json"))
    write_trace(trace, [Arrival(number * 5.0, 4.0, "m", "key1") for number in range(50)])
    endpoint.write_text("cold_workers = 0\nmax_workers = 4\ntarget_util = 0.8\n")
    fleet.write_text('[[gpu]]\nname = "a"\nscore = 1.0\nboot_s = 30\nprice_hour = 3.6\n')

    shown = CliRunner().invoke(
        command, [str(trace), "--endpoint", str(endpoint), "--workers", str(fleet), "--json", str(out), "--fixed", "2"]
    )
    runs = {run["name"]: run for run in json.loads(out.read_text())["runs"]}

    assert shown.exit_code == 0, shown.output
    assert set(runs) == {"comfyfleet", "least-loaded, no affinity", "concurrency 1", "fixed 2", "clairvoyant bound"}
    assert runs["comfyfleet"]["decisions"][0]["sentence"]
    assert runs["comfyfleet"]["cost"] == pytest.approx(runs["comfyfleet"]["gpu_s"]["total"] / 1000.0)
    assert "clairvoyant bound" in shown.output


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.csv", "t_s,model\n1,a\n", "work_s"),
        ("t.csv", "t_s,work_s\n5,1\n4,1\n", "line 3"),
        ("t.csv", "t_s,work_s\nx,1\n", "line 2"),
        ("e.toml", "max_worker = 3\n", "max_worker"),
        ("e.toml", "max_workers = \n", "e.toml"),
        ("f.toml", "[[gpu]]\nname = 'a'\nscore = 0\n", "score"),
        ("f.toml", "", "gpu"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_place(tmp_path, name, text, says):
    path = tmp_path / name
    path.write_text(text)
    read = {"t.csv": lambda: list(read_trace(path)), "e.toml": lambda: read_endpoint(path)}

    with pytest.raises(BadRequest, match=says):
        read.get(name, lambda: read_fleet(path))()


def test_the_generators_repeat_themselves_and_stay_in_order():
    for generate in GENERATORS.values():
        one = list(generate(hours=0.5))
        assert one == list(generate(hours=0.5))
        assert all(before.t_s <= after.t_s for before, after in itertools.pairwise(one))
        assert len({arrival.model for arrival in one}) > 1


def test_percentiles_are_the_nearest_rank():
    assert percentiles(range(1, 101)) == {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100, "mean": 50.5}
