"""A prompt runs lazily, tells what it does, remembers what it can, and stops when it is told to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from comfyfleet.engine.events import NodeProgress, RunFailed, RunInterrupted
from comfyfleet.engine.executor import Job
from comfyfleet.engine.failures import OUT_OF_MEMORY
from comfyfleet.engine.registry import InputFiles, ModelFiles, NodeRegistry, NodeRun, Shown, choice, integer, link
from support.engine_world import EngineWorld, node


class Model:
    """Weights in name only."""

    def __init__(self, key: str, size_bytes: int) -> None:
        self.key, self.size_bytes, self.places = key, size_bytes, []

    def move_to(self, device: str) -> None:
        self.places.append(device)


def made_up() -> NodeRegistry:
    """Nodes that count, add, show, step and fail."""
    registry = NodeRegistry()

    @registry.node("Number", inputs={"value": integer(0, -(10**9), 10**9)}, outputs=["INT"])
    def number(run: NodeRun, *, value: int) -> tuple[int]:
        return (value,)

    @registry.node("Add", inputs={"a": link("INT"), "b": link("INT", required=False)}, outputs=["INT"])
    def add(run: NodeRun, *, a: int, b: int = 0) -> tuple[int]:
        return (a + b,)

    @registry.node("Show", inputs={"value": link("INT")}, is_output=True)
    def show(run: NodeRun, *, value: int) -> Shown:
        return Shown(ui={"text": [str(value)]})

    @registry.node("Save", inputs={"value": link("INT")}, is_output=True)
    def save(run: NodeRun, *, value: int) -> Shown:
        name = run.folders.next_output("value", "txt")
        Path(name.staging_path).write_text(str(value))
        run.commit(name)
        return Shown(ui={"files": [name.shown()]})

    @registry.node("Steps", inputs={"count": integer(1, 1, 100)}, outputs=["INT"])
    def steps(run: NodeRun, *, count: int) -> tuple[int]:
        for step in range(count):
            run.progress(step + 1, count)
        return (count,)

    @registry.node("Fail", inputs={"value": link("INT")}, outputs=["INT"])
    def fail(run: NodeRun, *, value: int) -> tuple[int]:
        raise ValueError(f"{value} is no good")

    @registry.node("Devour", inputs={"value": link("INT")}, outputs=["INT"])
    def devour(run: NodeRun, *, value: int) -> tuple[int]:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 68719476736 bytes")

    @registry.node("Load", inputs={"name": choice(ModelFiles("vae"))}, outputs=["VAE"])
    def load(run: NodeRun, *, name: str) -> tuple[Model]:
        return (Model(Path(run.folders.model_path("vae", name)).read_text(), 10),)

    @registry.node("Use", inputs={"vae": link("VAE")}, outputs=["INT"])
    def use(run: NodeRun, *, vae: Model) -> tuple[int]:
        return (len(vae.key),)

    @registry.node("Read", inputs={"file": choice(InputFiles(media="image"))}, outputs=["INT"])
    def read(run: NodeRun, *, file: str) -> tuple[int]:
        return (int(Path(run.folders.input_path(file)).read_text()),)

    return registry


@pytest.fixture
def world(tmp_path: Path) -> EngineWorld:
    return EngineWorld(tmp_path, made_up())


SUM = {"1": node("Number", value=2), "2": node("Add", a=["1", 0], b=["1", 0]), "3": node("Show", value=["2", 0])}


def sum_of(value: int, **more: Any) -> dict:
    return {"1": node("Number", value=value), **{name: SUM[name] for name in ("2", "3")}, **more}


def test_a_run_tells_its_steps_in_order(world: EngineWorld) -> None:
    outcome = world.run(SUM)

    assert world.told() == [
        "RunStarted", "CacheHits",
        "NodeStarted 1", "NodeFinished 1",
        "NodeStarted 2", "NodeFinished 2",
        "NodeStarted 3", "NodeShown 3", "NodeFinished 3",
        "RunSucceeded",
    ]  # fmt: skip
    assert (outcome.status, outcome.outputs) == ("success", {"3": {"text": ["4"]}})


def test_a_repeat_runs_nothing_and_shows_the_same(world: EngineWorld) -> None:
    first = world.run(SUM)

    second = world.run(SUM)

    assert world.told() == ["RunStarted", "CacheHits", "NodeReused 3", "RunSucceeded"]
    assert world.events[1].nodes == ["1", "2", "3"]
    assert second.outputs == first.outputs


def test_results_outlive_other_prompts_and_do_not_go_by_node_ids(world: EngineWorld) -> None:
    world.run(sum_of(1))
    world.run(sum_of(2))

    renamed = {
        "a": node("Number", value=1),
        "b": node("Add", a=["a", 0], b=["a", 0]),
        "c": node("Show", value=["b", 0]),
    }
    world.run(renamed)

    assert world.ran() == []


def test_of_equal_nodes_one_runs_and_the_others_are_told_as_known(world: EngineWorld) -> None:
    outcome = world.run(
        {
            "1": node("Number", value=1),
            "2": node("Save", value=["1", 0]),
            "3": node("Number", value=1),
            "4": node("Save", value=["3", 0]),
        }
    )

    assert world.told() == [
        "RunStarted", "CacheHits",
        "NodeStarted 1", "NodeFinished 1",
        "NodeStarted 2", "NodeShown 2", "NodeFinished 2",
        "NodeReused 3", "NodeReused 4",
        "RunSucceeded",
    ]  # fmt: skip
    assert outcome.outputs["4"] == outcome.outputs["2"]
    assert len(world.output_files()) == 1


def test_only_what_a_change_touches_runs_again(world: EngineWorld) -> None:
    two = {"1": node("Number", value=1), "2": node("Number", value=5), "3": node("Add", a=["1", 0], b=["2", 0]),
           "4": node("Show", value=["3", 0])}  # fmt: skip
    world.run(two)

    world.run(two | {"2": node("Number", value=6)})

    assert world.ran() == ["2", "3", "4"]


def test_an_input_the_node_does_not_have_makes_it_another_result_and_leads_nowhere(world: EngineWorld) -> None:
    world.run(SUM)

    outcome = world.run(SUM | {"1": node("Number", value=2, audioUI="x", other=["not there", 0])})

    assert world.ran() == ["1", "2", "3"]
    assert outcome.status == "success"


def test_a_failure_names_its_node_and_input_and_good_branches_keep_theirs(world: EngineWorld) -> None:
    outcome = world.run(sum_of(7, **{"4": node("Fail", value=["1", 0]), "5": node("Show", value=["4", 0])}))

    failure = outcome.failure
    assert isinstance(failure, RunFailed)
    assert outcome.status == "error"
    assert (failure.node_id, failure.node_type, failure.exception_type) == ("4", "Fail", "ValueError")
    assert failure.exception_message == "7 is no good\n"
    assert failure.current_inputs == {"value": [7]}
    assert "1" in failure.executed
    assert failure.current_outputs == ["1", "2", "3", "4", "5"]
    assert world.told()[-1] == "RunFailed"
    world.run({"1": node("Number", value=7), "2": node("Show", value=["1", 0])})
    assert world.ran() == ["2"]


def test_out_of_memory_has_one_name_and_frees_what_can_be_freed(world: EngineWorld) -> None:
    world.run(SUM)

    outcome = world.run(
        {"1": node("Number", value=2), "2": node("Devour", value=["1", 0]), "3": node("Show", value=["2", 0])}
    )

    assert outcome.failure.exception_type == OUT_OF_MEMORY
    assert "smaller" in outcome.failure.exception_message
    world.run(SUM)
    assert world.ran() == ["1", "2", "3"]


def test_a_stop_takes_effect_at_the_next_step(world: EngineWorld) -> None:
    told: list = []

    def stop_after_three(event: object) -> None:
        told.append(event)
        world.stop = sum(isinstance(one, NodeProgress) for one in told) >= 3

    world.events = told
    graph = {"1": node("Steps", count=50), "2": node("Show", value=["1", 0])}
    world.executor.run(_job(graph, ["2"]), stop_after_three, lambda: world.stop)

    assert sum(isinstance(event, NodeProgress) for event in told) == 3
    assert isinstance(told[-1], RunInterrupted)
    assert told[-1].node_id == "1"


def _job(graph: dict, outputs: list[str]) -> Job:
    return Job(prompt_id="p", graph=graph, outputs=outputs, extra_pnginfo={})


def test_a_stop_between_nodes_is_told_for_the_node_that_would_have_run(world: EngineWorld) -> None:
    world.stop = True

    outcome = world.run(SUM)

    assert world.told() == ["RunStarted", "CacheHits", "NodeStarted 1", "RunInterrupted"]
    assert outcome.status == "interrupted"


def test_a_result_whose_file_is_gone_or_changed_is_made_again(world: EngineWorld) -> None:
    graph = {"1": node("Number", value=1), "2": node("Save", value=["1", 0])}
    world.run(graph)
    world.run(graph)
    assert world.ran() == []

    (world.folders.paths.output / "value_00001_.txt").unlink()
    world.run(graph)

    assert world.ran() == ["2"]
    assert world.output_files() == ["value_00001_.txt"]


def test_a_changed_model_file_is_loaded_again(world: EngineWorld, tmp_path: Path) -> None:
    file = tmp_path / "models" / "vae" / "a.safetensors"
    file.parent.mkdir(parents=True)
    file.write_text("four")
    graph = {"1": node("Load", name="a.safetensors"), "2": node("Use", vae=["1", 0]), "3": node("Show", value=["2", 0])}
    assert world.run(graph).outputs["3"] == {"text": ["4"]}

    file.write_text("longer")

    assert world.run(graph).outputs["3"] == {"text": ["6"]}


def test_an_input_file_counts_by_its_content(world: EngineWorld) -> None:
    file = world.folders.paths.input / "a.png"
    file.write_text("1")
    graph = {"1": node("Read", file="a.png"), "2": node("Show", value=["1", 0])}
    world.run(graph)

    file.write_text("1")
    world.run(graph)
    assert world.ran() == []

    file.write_text("2")
    assert world.run(graph).outputs["2"] == {"text": ["2"]}


def test_a_run_that_used_a_miniature_says_so(world: EngineWorld, tmp_path: Path) -> None:
    file = tmp_path / "miniatures" / "vae" / "a.safetensors"
    file.parent.mkdir(parents=True)
    file.write_text("tiny")
    graph = {"1": node("Load", name="a.safetensors"), "2": node("Use", vae=["1", 0]), "3": node("Show", value=["2", 0])}

    assert world.run(graph).miniature
    assert world.run(graph).miniature, "a repeat from the cache says it too"
    assert not world.run(SUM).miniature


def test_a_model_is_brought_to_the_device_before_the_node_that_computes_with_it(
    world: EngineWorld, tmp_path: Path
) -> None:
    file = tmp_path / "models" / "vae" / "a.safetensors"
    file.parent.mkdir(parents=True)
    file.write_text("four")

    world.run(
        {"1": node("Load", name="a.safetensors"), "2": node("Use", vae=["1", 0]), "3": node("Show", value=["2", 0])}
    )

    assert world.residency.size_bytes == 10


def test_free_drops_what_it_is_told_to(world: EngineWorld) -> None:
    world.run(SUM)
    world.executor.free(unload_models=True, drop_results=False)
    world.run(SUM)
    assert world.ran() == []

    world.executor.free(unload_models=False, drop_results=True)
    world.run(SUM)
    assert world.ran() == ["1", "2", "3"]


def test_a_value_that_nobody_needs_any_more_is_let_go_while_the_run_goes_on(tmp_path: Path) -> None:
    registry = made_up()
    alive: list[int] = []

    class Heavy:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    @registry.node("Heavy", inputs={"value": link("INT")}, outputs=["HEAVY"])
    def heavy(run: NodeRun, *, value: int) -> tuple[Heavy]:
        return (Heavy(),)

    @registry.node("Weigh", inputs={"heavy": link("HEAVY")}, outputs=["INT"])
    def weigh(run: NodeRun, *, heavy: Heavy) -> tuple[int]:
        return (1,)

    @registry.node("Count", inputs={"value": link("INT")}, outputs=["INT"])
    def count(run: NodeRun, *, value: int) -> tuple[int]:
        return (len(alive),)

    world = EngineWorld(tmp_path, registry, cache_bytes=0)
    graph = {
        "1": node("Number", value=1),
        "2": node("Heavy", value=["1", 0]),
        "3": node("Weigh", heavy=["2", 0]),
        "4": node("Count", value=["3", 0]),
        "5": node("Show", value=["4", 0]),
    }

    assert world.run(graph).outputs["5"] == {"text": ["0"]}


def test_previews_are_made_only_when_somebody_looks(world: EngineWorld) -> None:
    registry = world.registry
    asked: list[int] = []

    @registry.node("Paint", inputs={"value": integer(0)}, outputs=["INT"])
    def paint(run: NodeRun, *, value: int) -> tuple[int]:
        def preview() -> torch.Tensor:
            asked.append(1)
            return torch.zeros(1, 8, 16, 3)

        run.progress(1, 1, preview)
        return (value,)

    graph = {"1": node("Paint", value=1), "2": node("Show", value=["1", 0])}
    world.run(graph)
    assert asked == []

    told: list = []
    graph["1"] = node("Paint", value=2)
    world.executor.run(replace(_job(graph, ["2"]), wants_previews=True), told.append, lambda: False)
    (step,) = [event for event in told if isinstance(event, NodeProgress)]
    assert step.preview.startswith(b"\xff\xd8\xff")


def test_a_stop_while_a_film_is_encoded_leaves_nothing_half_written(tmp_path: Path) -> None:
    world = EngineWorld(tmp_path)
    asked: list[int] = []

    def stop_after_a_while() -> bool:
        asked.append(1)
        return len(asked) > 20

    graph = {
        "1": node("EmptyImage", width=32, height=32, batch_size=60, color=1),
        "2": node("CreateVideo", images=["1", 0], fps=16.0),
        "3": node("SaveVideo", video=["2", 0], filename_prefix="film", format="auto", codec="auto"),
    }
    outcome = world.executor.run(_job(graph, ["3"]), world.events.append, stop_after_a_while)

    assert outcome.status == "interrupted"
    assert len(asked) == 21, "it stopped before the next frame"
    assert world.output_files() == []
