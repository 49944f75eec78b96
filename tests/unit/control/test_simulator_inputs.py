"""What the simulator is given: nothing makes it hang or fall over, and what cannot be is refused by name and place."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from comfyfleet.cli.simulate import command
from comfyfleet.control.bounds import BOUNDS, check_bounds
from comfyfleet.control.scaling import ScalePolicy
from comfyfleet.control.simulator.files import FleetFile, GpuKind, read_endpoint, read_fleet
from comfyfleet.control.simulator.simulation import Simulation
from comfyfleet.control.simulator.strategies import FixedFleet, KnativeConcurrency, OurAutoscaler
from comfyfleet.control.simulator.summary import summarise
from comfyfleet.control.simulator.trace import Arrival, read_trace
from comfyfleet.wire.errors import BadRequest, InvalidArguments

FLEET = FleetFile(gpu=(GpuKind(name="a", score=2.0, boot_s=60.0, wake_s=10.0, swap_s=5.0, count=10),))
POLICY = ScalePolicy(endpoint_id=1, cold_workers=0, max_workers=10, cold_mult=1.0)


def play(arrivals, strategy=None, *, policy=POLICY, fleet=FLEET, until_s=None):
    outcome = Simulation(policy=policy, fleet=fleet, strategy=strategy or OurAutoscaler()).run(
        arrivals, until_s=until_s
    )
    return summarise("run", outcome, with_decisions=True)


@pytest.fixture
def files(tmp_path):
    """A good trace, endpoint and fleet; a test spoils one."""
    (tmp_path / "t.csv").write_text("t_s,work_s,model,tenant\n0,1,a,x\n5,1,a,x\n")
    (tmp_path / "e.toml").write_text("max_workers = 4\ncold_workers = 0\n")
    (tmp_path / "f.toml").write_text('[[gpu]]\nname = "a"\nscore = 1.0\n')
    return tmp_path


def simulate(files, *options):
    arguments = [str(files / "t.csv"), "--endpoint", str(files / "e.toml"), "--workers", str(files / "f.toml")]
    return CliRunner().invoke(command, [*arguments, *options])


@pytest.mark.parametrize("begin", [1_700_000_000.0, -86_400.0, -1.0, 12_345.0])
@pytest.mark.parametrize("strategy", [OurAutoscaler, lambda: KnativeConcurrency(1.0), lambda: FixedFleet(3)])
def test_a_trace_may_count_its_seconds_from_anywhere(begin, strategy):
    arrivals = [Arrival(number * 2.5, 4.0, f"m{number % 3}") for number in range(80)]

    here = play(arrivals, strategy())
    there = play([arrival._replace(t_s=arrival.t_s + begin) for arrival in arrivals], strategy())

    assert (there.wait_s, there.gpu_s, there.cost) == (here.wait_s, here.gpu_s, here.cost)
    assert [decision.sentence for decision in there.decisions] == [decision.sentence for decision in here.decisions]
    assert [decision.t_s - begin for decision in there.decisions] == [decision.t_s for decision in here.decisions]


def test_a_run_ends_in_the_traces_own_time():
    simulation = Simulation(policy=POLICY, fleet=FLEET, strategy=OurAutoscaler())

    outcome = simulation.run([Arrival(1_700_000_000.5, 20.0)], until_s=1_700_000_030.0)

    assert outcome.until_s == 1_700_000_030.0
    assert outcome.left_waiting == 1


@pytest.mark.parametrize("field", sorted(set(ScalePolicy.__struct_fields__) & set(BOUNDS)))
def test_a_parameter_is_within_the_bounds_of_the_management_api(files, field):
    lowest, highest = BOUNDS[field]
    whole = field.endswith("_workers")

    def text(value):
        return f"{field} = {int(value) if whole else float(value)}\n"

    for value in (lowest, highest):
        (files / "e.toml").write_text(text(value))
        policy = read_endpoint(files / "e.toml")
        assert getattr(policy, field) == value
        play([Arrival(0.5, 20.0, "m"), Arrival(9.0, 1.0)], policy=policy, until_s=120.0)
    for value in (lowest - 1, highest + 1) if whole else (lowest - 0.5, highest * 2, "nan", "inf", "-inf"):
        (files / "e.toml").write_text(text(value))
        with pytest.raises(BadRequest, match=rf"e\.toml: {field} must be from"):
            read_endpoint(files / "e.toml")
    with pytest.raises(InvalidArguments, match=f"{field} must be from .* to .*, not"):
        check_bounds({field: highest * 2})


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
@pytest.mark.parametrize("field", ["score", "boot_s", "wake_s", "swap_s", "price_hour"])
def test_a_kind_of_gpu_has_finite_numbers_that_are_not_negative(files, field, value):
    score = "" if field == "score" else "score = 1.0\n"
    (files / "f.toml").write_text(f'[[gpu]]\nname = "a40"\n{score}{field} = {value}\n')

    with pytest.raises(BadRequest, match=rf"f\.toml: gpu 'a40': {field} must be from"):
        read_fleet(files / "f.toml")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("f.toml", b"[[gpu]]\nname = 'a'\nscore = 1\ncount = -1\n", "gpu 'a': count"),
        ("f.toml", b"[[gpu]]\nname = 'a'\nscore = 1\ncount = 2.5\n", "int"),
        ("f.toml", b"[[gpu]]\nname = 'a'\nscore = 1\ncount = " + b"9" * 5000, "f.toml"),
        ("f.toml", b"[[gpu]]\nname = 'a'\nscore = 1\nwarm_models = 0\n", "warm_models"),
        ("f.toml", b"[[gpu]]\nname = '\xe9'\nscore = 1\n", "not UTF-8"),
        ("e.toml", b"endpoint = 3\n", "endpoint must be a table"),
        ("e.toml", b"max_workers = 2.5\n", "max_workers"),
        ("e.toml", b"# \xff\n", "not UTF-8"),
        ("t.csv", b"t_s,work_s,model\n1,1,a\n2,1,\xe9\n", "line 3: this is not UTF-8"),
        ("t.csv", b"t_s,work_s\n" + b"1,1\n" * 9000 + b"2,1,\xff\n", "line 9002: this is not UTF-8"),
        ("t.csv", b"t_s,work_s,model\n1,1," + b"a" * 200_000 + b"\n", "line 2: field larger"),
        ("t.csv", b't_s,work_s,model\n1,1,"two\nlines"\n2,x\n', "line 4: t_s and work_s must be numbers"),
        ("t.csv", b"t_s,work_s\nnan,1\n", "line 2"),
        ("t.csv", b"t_s,work_s\n1,-1\n", "line 2"),
        ("t.csv", b"t_s,work_s\n0,1\n1700000000,1\n", "line 3: nothing arrives for 19676 days"),
        ("t.csv", b"", "column t_s is missing"),
    ],
)
def test_a_file_that_cannot_be_is_one_refusal_that_names_it(files, name, text, says):
    (files / name).write_bytes(text)

    shown = simulate(files)

    assert isinstance(shown.exception, BadRequest), shown.exception
    assert str(files / name) in shown.exception.message
    assert says in shown.exception.message


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--tick", value) for value in ("0", "-1", "nan", "inf", "1e-9")),
        *(("--concurrency", value) for value in ("0", "-1", "nan", "inf", "1e-320")),
        *(("--fixed", value) for value in ("-1", "1.5", "nan")),
    ],
)
def test_an_option_out_of_its_range_is_refused_by_name(files, option, value):
    shown = simulate(files, option, value)

    assert shown.exit_code == 2
    assert option in shown.output


def test_files_with_a_byte_order_mark_as_windows_writes_them_are_read(files):
    plain = list(read_trace(files / "t.csv"))
    for name in ("t.csv", "e.toml", "f.toml"):
        (files / name).write_bytes(b"\xef\xbb\xbf" + (files / name).read_bytes().replace(b"\n", b"\r\n"))

    shown = simulate(files, "--json", str(files / "o.json"), "--tick", "0.5")

    assert shown.exit_code == 0, shown.output
    assert list(read_trace(files / "t.csv")) == plain
    assert json.loads((files / "o.json").read_text())["runs"][0]["requests"] == 2
