"""Two runs at once give what each gives alone: nothing computed twice, no file name shared, memory for both or in turn.

Nodes meet at gates that the tests hold, so nothing here depends on how fast anything is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from comfyfleet.engine.events import Event, RunOutcome, SamplingEnded
from comfyfleet.engine.executor import Job
from comfyfleet.engine.memory import Residency
from comfyfleet.engine.registry import NodeRegistry, NodeRun, Shown, integer, link, text
from support.engine_world import EngineWorld, node

LIMIT_S = 60


class Gate:
    """A place in a node: the test sees that somebody came, and lets it pass."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def pass_through(self, run: NodeRun) -> None:
        self.reached.set()
        while not self.opened.wait(0.05):
            run.check_stop()

    def await_arrival(self) -> None:
        assert self.reached.wait(LIMIT_S)


class Model:
    def __init__(self, name: str, size_bytes: int) -> None:
        self.key, self.size_bytes, self.place = name, size_bytes, "cpu"

    def move_to(self, device: str) -> None:
        self.place = device


class Nodes:
    """A registry, what its nodes did, and their gates by name."""

    def __init__(self) -> None:
        self.registry, self.done, self.gates = NodeRegistry(), [], {}
        self.room = 1
        self.models = {name: Model(name, 60) for name in ("a", "b")}
        add = self.registry.node

        @add("Number", inputs={"value": integer(0, 0, 99)}, outputs=["INT"])
        def number(run: NodeRun, *, value: int) -> tuple[int]:
            return (value,)

        @add("Work", inputs={"value": link("INT"), "gate": text()}, outputs=["INT"])
        def work(run: NodeRun, *, value: int, gate: str) -> tuple[int]:
            self.done.append(value)
            if gate:
                self.gates[gate].pass_through(run)
            return (value + 1,)

        @add("Sample", inputs={"model": link("MODEL"), "steps": integer(1, 1, 99)}, outputs=["LATENT"])
        def sample(run: NodeRun, *, model: Model, steps: int) -> tuple[int]:
            for step in range(steps):
                run.progress(step + 1, steps)
            return (steps,)

        @add("Load", inputs={"name": text()}, outputs=["MODEL", "VAE"])
        def load(run: NodeRun, *, name: str) -> tuple[Model, Model]:
            return (self.models[name], self.models[name])

        @add("Decode", inputs={"vae": link("VAE"), "gate": text()}, outputs=["INT"])
        def decode(run: NodeRun, *, vae: Model, gate: str) -> tuple[int]:
            self.done.append(vae.key)
            if gate:
                self.gates[gate].pass_through(run)
            return (7,)

        @add("Greedy", inputs={"value": link("INT"), "gate": text()}, outputs=["INT"])
        def greedy(run: NodeRun, *, value: int, gate: str) -> tuple[int]:
            self.gates[gate].reached.set()
            if self.room < 1:
                raise RuntimeError("can't allocate memory")
            return (value,)

        @add("Hog", inputs={"value": link("INT"), "gate": text(), "steps": integer(1, 1, 99)}, outputs=["INT"])
        def hog(run: NodeRun, *, value: int, gate: str, steps: int) -> tuple[int]:
            self.room -= 1
            self.gates[gate].reached.set()
            self.gates[gate].opened.wait(LIMIT_S)
            self.room += 1  # between two steps nothing is held
            run.progress(1, 2)
            self.done.append("hog went on")
            return (value,)

        @add("Save", inputs={"value": link("*"), "gate": text(), "files": integer(1, 1, 9)}, is_output=True)
        def save(run: NodeRun, *, value: object, gate: str, files: int) -> Shown:
            shown = []
            for place in range(files):
                name = run.folders.next_output("x", "txt", batch_number=place)
                Path(name.staging_path).write_text(f"{value}")
                if gate:
                    self.gates[gate].pass_through(run)
                run.commit(name)
                shown.append(name.shown())
            return Shown(ui={"files": shown})

        @add("Show", inputs={"value": link("*")}, is_output=True)
        def show(run: NodeRun, *, value: object) -> Shown:
            return Shown(ui={"text": [str(value)]})

    def gate(self, name: str) -> Gate:
        return self.gates.setdefault(name, Gate())


class TwoRuns:
    def __init__(self, world: EngineWorld) -> None:
        self.world, self.stopped = world, set()
        self.events: dict[str, list[Event]] = {}
        self.outcomes: dict[str, RunOutcome] = {}

    def run(self, name: str, graph: dict, on_event: Callable[[Event], None] = lambda _: None) -> None:
        outputs = [key for key, value in graph.items() if value["class_type"] in ("Save", "Show")]
        told = self.events.setdefault(name, [])

        def emit(event: Event) -> None:
            told.append(event)
            on_event(event)

        job = Job(prompt_id=name, graph=graph, outputs=outputs, extra_pnginfo={})
        self.outcomes[name] = self.world.executor.run(job, emit, lambda: name in self.stopped)

    @contextmanager
    def beside(self, name: str, graph: dict) -> Iterator[None]:
        """Run it on a thread of its own meanwhile; ended when left."""
        thread = threading.Thread(target=self.run, args=(name, graph), daemon=True)
        thread.start()
        yield
        thread.join(LIMIT_S)
        assert not thread.is_alive()

    def told(self, name: str) -> list[str]:
        return [f"{type(event).__name__} {getattr(event, 'node', '')}".strip() for event in self.events[name]]


@pytest.fixture
def nodes() -> Nodes:
    return Nodes()


@pytest.fixture
def two(tmp_path: Path, nodes: Nodes) -> TwoRuns:
    return TwoRuns(EngineWorld(tmp_path, nodes.registry))


def worked(value: int, gate: str = "", **save: object) -> dict:
    return {
        "1": node("Number", value=value),
        "2": node("Work", value=["1", 0], gate=gate),
        "3": node("Save", value=["2", 0], gate=save.get("held", ""), files=save.get("files", 1)),
    }


def test_what_one_run_computes_the_other_waits_for(two: TwoRuns, nodes: Nodes) -> None:
    gate = nodes.gate("g")
    with two.beside("first", worked(5, "g")):
        gate.await_arrival()
        with two.beside("second", worked(5, "g") | {"4": node("Show", value=["2", 0])}):
            gate.opened.set()

    assert nodes.done == [5]
    assert two.outcomes["second"].outputs["4"] == {"text": ["6"]}
    assert two.outcomes["first"].outputs["3"] == two.outcomes["second"].outputs["3"]


def test_a_run_that_waits_for_the_other_can_be_stopped(two: TwoRuns, nodes: Nodes) -> None:
    gate = nodes.gate("g")
    with two.beside("first", worked(5, "g")):
        gate.await_arrival()
        two.stopped.add("second")
        two.run("second", worked(5, "g"))
        gate.opened.set()

    assert (two.outcomes["second"].status, two.outcomes["first"].status) == ("interrupted", "success")


def test_files_of_two_runs_never_share_a_name(two: TwoRuns, nodes: Nodes) -> None:
    gate = nodes.gate("s")
    with two.beside("first", worked(1, held="s", files=3)):
        gate.await_arrival()
        two.run("second", worked(2))  # while the first has one name and wants two more
        gate.opened.set()

    first, second = ([file["filename"] for file in two.outcomes[name].outputs["3"]["files"]] for name in two.outcomes)
    names = {*first, *second}
    assert len(names) == 4
    contents = {path.name: path.read_text() for path in two.world.folders.paths.output.glob("*.txt")}
    assert contents.keys() == names
    assert [contents[name] for name in two_files(two, "second")] == ["3"]


def two_files(two: TwoRuns, name: str) -> list[str]:
    return [file["filename"] for file in two.outcomes[name].outputs["3"]["files"]]


def test_a_stopped_run_removes_only_its_own_half_written_files(two: TwoRuns, nodes: Nodes) -> None:
    kept, dropped = nodes.gate("kept"), nodes.gate("dropped")
    with two.beside("first", worked(1, held="kept")):
        kept.await_arrival()
        with two.beside("second", worked(2, held="dropped")):
            dropped.await_arrival()
            two.stopped.add("second")
        kept.opened.set()

    assert (two.outcomes["first"].status, two.outcomes["second"].status) == ("success", "interrupted")
    assert two.world.output_files() == [two_files(two, "first")[0]]


def sampled(model: str, steps: int, gate: str = "") -> dict:
    return {
        "1": node("Load", name=model),
        "2": node("Sample", model=["1", 0], steps=steps),
        "3": node("Decode", vae=["1", 1], gate=gate),
        "4": node("Sample", model=["1", 0], steps=steps + 1),
        "8": node("Show", value=["2", 0]),
        "9": node("Show", value=["4", 0]),
        "10": node("Show", value=["3", 0]),
    }


def test_the_end_of_sampling_is_told_once_after_the_last_sampler(two: TwoRuns) -> None:
    two.run("a", sampled("a", 2))
    two.run("again", sampled("a", 2))
    two.run("none", worked(1))

    told = two.told("a")
    assert told.count("SamplingEnded") == 1
    assert told.index("SamplingEnded") > max(told.index("NodeFinished 2"), told.index("NodeFinished 4"))
    assert not any(isinstance(event, SamplingEnded) for name in ("again", "none") for event in two.events[name])


def test_a_model_computes_for_one_run_at_a_time(two: TwoRuns, nodes: Nodes) -> None:
    held, free = nodes.gate("held"), nodes.gate("free")
    free.opened.set()

    def decode(model: str, gate: str) -> dict:
        return {
            "1": node("Load", name=model),
            "2": node("Decode", vae=["1", 1], gate=gate),
            "3": node("Show", value=["2", 0]),
        }

    with two.beside("first", decode("a", "held")):
        held.await_arrival()
        two.run("other model", decode("b", "free"))
        with two.beside("same model", decode("a", "free")):
            free.reached.clear()
            assert nodes.done == ["a", "b"]
            held.opened.set()

    assert nodes.done == ["a", "b", "a"]
    assert all(outcome.status == "success" for outcome in two.outcomes.values())


def test_a_model_in_use_stays_while_another_needs_its_room() -> None:
    memory, decoder, sampler = Residency("cuda:0", 100), Model("decoder", 60), Model("sampler", 60)
    started = threading.Event()
    places: list[str] = []

    def sample() -> None:
        started.set()
        with memory.using([sampler], lambda: None):
            places.append(decoder.place)

    with memory.using([decoder], lambda: None):
        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        assert started.wait(LIMIT_S)
        memory.release_all()
        assert (decoder.place, places) == ("cuda:0", [])
    thread.join(LIMIT_S)

    assert places == ["cpu"]
    assert sampler.place == "cuda:0"


def show_of(source: str) -> dict:
    return node("Show", value=[source, 0])


def test_a_node_without_memory_beside_another_run_gets_all_of_it(two: TwoRuns, nodes: Nodes) -> None:
    hog, greedy = nodes.gate("hog"), nodes.gate("greedy")
    hogs = {
        "1": node("Number", value=1),
        "2": node("Hog", value=["1", 0], gate="hog", steps=2),
        "3": show_of("2"),
    }
    needs = {
        "1": node("Number", value=2),
        "2": node("Greedy", value=["1", 0], gate="greedy"),
        "3": node("Show", value=["2", 0]),
    }
    with two.beside("hog", hogs):
        hog.await_arrival()
        with two.beside("greedy", needs):
            greedy.await_arrival()
            hog.opened.set()

    assert (two.outcomes["greedy"].status, two.outcomes["hog"].status) == ("success", "success")
    assert two.outcomes["greedy"].outputs["3"] == {"text": ["2"]}
    assert nodes.room == 1


def test_a_run_alone_that_lacks_memory_fails(two: TwoRuns, nodes: Nodes) -> None:
    nodes.room = 0
    nodes.gate("g")
    two.run(
        "a",
        {
            "1": node("Number", value=2),
            "2": node("Greedy", value=["1", 0], gate="g"),
            "3": node("Show", value=["2", 0]),
        },
    )

    assert two.outcomes["a"].status == "error"
