"""Runs a checked prompt: takes what is known from the cache, runs the rest in order, tells every step as an event.

On the thread that calls `run`; two may run at once (`sharing`), the results of each being what they are alone. It never
raises for what a node did: a failure, an interrupt and running out of memory are outcomes. It stops between nodes and
wherever a node tells its progress.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from comfyfleet.clock import Clock
from comfyfleet.engine import events
from comfyfleet.engine.cache import FileState, Result, ResultCache
from comfyfleet.engine.failures import OUT_OF_MEMORY, describe_error, shown_value
from comfyfleet.engine.folders import EngineFolders
from comfyfleet.engine.media.pictures import preview_jpeg, whole_png
from comfyfleet.engine.memory import Residency
from comfyfleet.engine.models.prompt_weights import EMBEDDING_WORD
from comfyfleet.engine.models.textual_inversion import files_named
from comfyfleet.engine.plan import Plan
from comfyfleet.engine.registry import (
    Declaration,
    InputFiles,
    Interrupted,
    ModelFiles,
    NodeRegistry,
    OutputName,
    Shown,
)
from comfyfleet.engine.sharing import InHand, Turns
from comfyfleet.engine.signature import links_of, signatures
from comfyfleet.engine.values import DiffusionModel
from comfyfleet.wire.workflow import is_link

MODEL_KINDS = {"MODEL", "CLIP", "VAE"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked prompt to run. `outputs` are those that validation found good."""

    prompt_id: str
    graph: Mapping[str, Any]
    outputs: list[str]
    extra_pnginfo: Mapping[str, Any]
    wants_previews: bool = False


class Executor:
    """Holds what outlives a run: registry, folders, result cache, models on the device."""

    def __init__(
        self,
        *,
        registry: NodeRegistry,
        folders: EngineFolders,
        cache: ResultCache,
        residency: Residency,
        clock: Clock,
    ) -> None:
        self.registry = registry
        self.folders = folders
        self.cache = cache
        self.residency = residency
        self.clock = clock
        self.in_hand = InHand()
        self.turns = Turns()

    def run(self, job: Job, emit: events.Emit, is_stopped: Callable[[], bool]) -> events.RunOutcome:
        """Run the job's outputs. `is_stopped` is asked before each node and at each step."""
        run = _Run(self, job, emit, is_stopped)
        with self.turns.of(run):
            try:
                return run.execute()
            finally:
                run.folders.discard_unfinished()

    def free(self, *, unload_models: bool, drop_results: bool) -> None:
        """Give memory back between prompts."""
        if drop_results:
            self.cache.clear()
        if unload_models:
            self.cache.drop_holding_weights()
            self.residency.release_all()

    def now_ms(self) -> int:
        return int(self.clock.now() * 1000)


class _Run:
    """One run of one job; also the `NodeRun` that its nodes see."""

    def __init__(self, owner: Executor, job: Job, emit: events.Emit, is_stopped: Callable[[], bool]) -> None:
        self._owner = owner
        self._job = job
        self._emit = emit
        self._is_stopped = is_stopped
        self._executed: list[str] = []
        self._values: dict[str, tuple[Any, ...]] = {}  # their outputs, for as long as a node waits for them
        self._shown: dict[str, events.Ui] = {}
        self._sources = {
            node_id: links_of(node, self._declaration(node["class_type"])) for node_id, node in job.graph.items()
        }
        self._written: list[FileState] = []
        self._waiting_users: Counter[str] = Counter()
        self.node_id = ""
        self.folders = owner.folders.for_run()
        self._to_do_alone: set[str] = set()  # what must be done before another run may start beside this one
        self._has_sampled = False
        self.prompt = job.graph
        self.extra_pnginfo = job.extra_pnginfo
        self.device = owner.residency.device

    # What a node may ask

    def progress(self, value: int, maximum: int, preview: Callable[[], Any] | None = None) -> None:
        self.check_stop()
        image = preview_jpeg(preview()) if preview is not None and self._job.wants_previews else None
        self._emit(events.NodeProgress(node=self.node_id, value=value, maximum=maximum, preview=image))

    def send_picture(self, value: int, maximum: int, frame: Any) -> None:
        self.check_stop()
        image = whole_png(frame) if self._job.wants_previews else None
        self._emit(
            events.NodeProgress(node=self.node_id, value=value, maximum=maximum, preview=image, preview_is_png=True)
        )

    def check_stop(self) -> None:
        self._owner.turns.give_way(self)
        if self._is_stopped():
            raise Interrupted

    def commit(self, output: OutputName) -> None:
        self.folders.commit(output)
        self._written.append(FileState.of(output.path))

    # The run

    def execute(self) -> events.RunOutcome:
        graph, owner = self._job.graph, self._owner
        self._emit(events.RunStarted(timestamp_ms=owner.now_ms()))
        names = signatures(graph, self._declaration, self._file_mark)
        known: dict[str, events.Ui | None] = {}
        for node_id in graph:
            result = owner.cache.get(names.get(node_id))
            if result is not None:
                known[node_id] = result.ui
                self._keep(node_id, result)
        self._emit(events.CacheHits(nodes=list(known), timestamp_ms=owner.now_ms()))
        is_output = {node_id: self._declaration(node["class_type"]).is_output for node_id, node in graph.items()}
        plan = Plan(self._sources, self._job.outputs, is_output=is_output, known=known)
        for node_id in plan:
            if node_id not in known:
                for source in self._sources[node_id]:
                    self._waiting_users[source] += 1
                declaration = self._declaration(graph[node_id]["class_type"])
                if _samples(declaration) or declaration.is_volatile:
                    self._to_do_alone.add(node_id)
        self._values = {node_id: value for node_id, value in self._values.items() if self._waiting_users[node_id]}
        while (next_node := plan.next_node()) is not None:
            node_id = self.node_id = next_node
            if node_id in known:
                self._emit(events.NodeReused(node=node_id, ui=known[node_id]))
                plan.finish(node_id)
                continue
            made = owner.cache.get(names.get(node_id))
            if made is not None:  # since this run began: by an equal node of its own, or by another run
                self._keep(node_id, made)
                self._emit(events.NodeReused(node=node_id, ui=made.ui))
            else:
                failure = self._attempt(node_id, names.get(node_id))
                if failure is not None:
                    return self._outcome("error", failure)
                if node_id not in self._values:
                    return self._outcome("interrupted", None)
                self._executed.append(node_id)
            self._let_go(node_id)
            self._tell_sampled(node_id)
            plan.finish(node_id)
        self._emit(events.RunSucceeded(timestamp_ms=owner.now_ms()))
        return self._outcome("success", None)

    def _attempt(self, node_id: str, signature: str | None) -> events.RunFailed | None:
        """Run one node. None with a value: it ran. None without: interrupted. Else: why it failed."""
        self._emit(events.NodeStarted(node=node_id))
        class_type = self._job.graph[node_id]["class_type"]
        inputs: dict[str, Any] = {}
        try:
            self.check_stop()
            inputs = self._inputs(node_id)
            with self._owner.in_hand.hold(signature, self.check_stop):
                result = self._owner.cache.get(signature)  # another run may have made it since this one began
                if result is None:
                    result = self._call_with_room(class_type, inputs)
                    self._owner.cache.put(signature, result)
        except Interrupted:
            self._emit(
                events.RunInterrupted(
                    node_id=node_id,
                    node_type=class_type,
                    executed=list(reversed(self._executed)),
                    timestamp_ms=self._owner.now_ms(),
                )
            )
            return None
        except Exception as error:  # the boundary of a node: whatever its code raises is the job's failure
            failure = self._failure(node_id, class_type, inputs, error)
            self._emit(failure)
            if failure.exception_type == OUT_OF_MEMORY:
                self._values.clear()
                self._owner.free(unload_models=True, drop_results=True)
            return failure
        self._keep(node_id, result)
        if result.ui is not None:
            self._emit(events.NodeShown(node=node_id, ui=result.ui))
        self._emit(events.NodeFinished(node=node_id))
        return None

    def _tell_sampled(self, node_id: str) -> None:
        """After the last node that samples, and the last that sends pictures, which carry no prompt's name."""
        if node_id in self._to_do_alone:
            self._to_do_alone.discard(node_id)
            self._has_sampled |= _samples(self._declaration(self._job.graph[node_id]["class_type"]))
            if self._has_sampled and not self._to_do_alone:
                self._emit(events.SamplingEnded())

    def _keep(self, node_id: str, result: Result) -> None:
        self._values[node_id] = result.outputs
        if result.ui is not None:
            self._shown[node_id] = result.ui

    def _let_go(self, node_id: str) -> None:
        """What this node took and nobody else waits for lives on in the cache only, if there."""
        for source in self._sources[node_id]:
            self._waiting_users[source] -= 1
            if self._waiting_users[source] == 0:
                del self._values[source]

    def _inputs(self, node_id: str) -> dict[str, Any]:
        node = self._job.graph[node_id]
        declared = self._declaration(node["class_type"]).inputs
        found: dict[str, Any] = {}
        for name, value in node["inputs"].items():
            if name not in declared:
                continue
            found[name] = self._values[value[0]][value[1]] if is_link(value) else value
        return found

    def _call_with_room(self, class_type: str, inputs: dict[str, Any]) -> Result:
        """A node that found too little memory beside another run gets all of it, once."""
        try:
            return self._call(class_type, inputs)
        except Interrupted:
            raise
        except Exception as error:
            if not self._owner.turns.is_shared() or describe_error(error)[0] != OUT_OF_MEMORY:
                raise
        with self._owner.turns.alone(self, self.check_stop):
            self._owner.residency.release_all()
            return self._call(class_type, inputs)

    def _call(self, class_type: str, inputs: dict[str, Any]) -> Result:
        node = self._owner.registry[class_type]
        self._written = []
        models = _computing(node.declaration, inputs)
        if models:
            with self._owner.residency.using(models, self.check_stop):
                given = node.function(self, **inputs)
        else:
            given = node.function(self, **inputs)
        self._note_models(node.declaration, inputs, given)
        if isinstance(given, Shown):
            ui = {name: list(values) for name, values in given.ui.items()}
            return Result(outputs=given.outputs, ui=ui, files=tuple(self._written))
        return Result(outputs=given, files=tuple(self._written))

    def _note_models(self, declaration: Declaration, inputs: Mapping[str, Any], given: Any) -> None:
        """A loader's models are known by their files; one that a loader changed (a LoRA) by both."""
        files = {
            str(inputs[name])
            for name, declared in declaration.inputs.items()
            if isinstance(declared.options, ModelFiles) and inputs[name] not in declared.options.built_in
        }
        if not files or not isinstance(given, tuple):
            return
        residency = self._owner.residency
        for kind, value in zip(declaration.outputs, given, strict=False):
            if kind in MODEL_KINDS:
                before = [inputs[name] for name, of in declaration.inputs.items() if of.kind == kind]
                inherited = {file for model in before for file in residency.files_of(_weights(model))}
                residency.came_from(_weights(value), files | inherited)

    def _failure(self, node_id: str, class_type: str, inputs: Mapping[str, Any], error: Exception) -> events.RunFailed:
        kind, message = describe_error(error)
        return events.RunFailed(
            node_id=node_id,
            node_type=class_type,
            executed=list(reversed(self._executed)),
            exception_message=message,
            exception_type=kind,
            traceback=traceback.format_tb(error.__traceback__),
            current_inputs={name: [shown_value(value)] for name, value in inputs.items()},
            current_outputs=list(self._job.graph),  # every node, whatever has run: as ComfyUI has it
            timestamp_ms=self._owner.now_ms(),
        )

    def _outcome(self, status: Any, failure: events.RunFailed | None) -> events.RunOutcome:
        return events.RunOutcome(
            status=status,
            outputs={node_id: self._shown[node_id] for node_id in self._job.graph if node_id in self._shown},
            miniature=self._used_miniature(),
            resident_models=self._owner.residency.files(),
            failure=failure,
        )

    def _used_miniature(self) -> bool:
        """True when a loader upstream of an output names a miniature file."""
        try:
            return any(self.folders.is_miniature(folder, name) for folder, name in self._needed_models())
        except FileNotFoundError:
            return False  # a file that is gone: nothing was made with it

    def _needed_models(self) -> list[tuple[str, str]]:
        """(folder, name) of the model files that the job's outputs hang on."""
        found = []
        stack, seen = list(self._job.outputs), set(self._job.outputs)
        while stack:
            node_id = stack.pop()
            node = self._job.graph[node_id]
            for source in self._sources[node_id]:
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
            for name, declared in self._declaration(node["class_type"]).inputs.items():
                value = node["inputs"].get(name)
                options = declared.options
                if isinstance(options, ModelFiles) and isinstance(value, str) and value not in options.built_in:
                    found.append((options.folder, value))
        return found

    # What a signature asks

    def _declaration(self, class_type: str) -> Declaration:
        return self._owner.registry[class_type].declaration

    def _file_mark(self, declaration: Declaration, name: str, value: Any) -> str:
        options = declaration.inputs[name].options
        try:
            if options is None and isinstance(value, str) and EMBEDDING_WORD in value:
                return "|".join(map(self.folders.state_of, files_named(value, self.folders)))
            if isinstance(options, ModelFiles) and isinstance(value, str):
                return self.folders.state_of(self.folders.model_path(options.folder, value))
            if isinstance(options, InputFiles) and isinstance(value, str):
                return self.folders.digest_of(self.folders.input_path(value))
        except OSError:
            pass  # the file is gone: its node will say so when it runs, and nothing cached can match
        return ""


def _samples(declaration: Declaration) -> bool:
    return "LATENT" in declaration.outputs and any(one.kind == "MODEL" for one in declaration.inputs.values())


def _computing(declaration: Declaration, inputs: Mapping[str, Any]) -> list[Any]:
    """The models that a node computes with: those that it takes and does not hand on."""
    found = []
    for name, declared in declaration.inputs.items():
        if declared.kind in MODEL_KINDS and declared.kind not in declaration.outputs and name in inputs:
            if isinstance(inputs[name], str | int | float | bool | list | dict):
                raise TypeError(f"{name} needs a link to a node that gives a {declared.kind}, not a plain value")
            found.append(_weights(inputs[name]))
    return found


def _weights(model: Any) -> Any:
    """What of a model value is in memory: every copy of a MODEL that a patching node made shares it."""
    return model.network if isinstance(model, DiffusionModel) else model
