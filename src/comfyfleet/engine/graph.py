"""A prompt checked against node declarations, with ComfyUI's verdicts: the types, shapes and words clients parse.

`check_prompt` is pure but for the lists of files, which it asks of the folders. Conversions ("64" becomes 64) happen in
place, as in ComfyUI, so that history and file metadata show what was used. Where ComfyUI would answer 200 and die, or
refuse without a reason (a cycle), the answer here is a refusal that names the node.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from comfyfleet.engine.description import BY_SCHEMA
from comfyfleet.engine.inputs import check_constant, complaint, input_config, nearest
from comfyfleet.engine.registry import Declaration, Folders
from comfyfleet.wire.workflow import unfit_value

MAX_DEPTH = 450  # of a node; ComfyUI lives at 400 and its worker dies near 900
MAX_NODES = 20_000
HINT = (
    "this embedded engine has no such node; point COMFYUI_API_BASE or COMFYUI_INSTALL_PATH at a real ComfyUI to use it"
)

Prompt = dict[str, dict[str, Any]]


class PromptRefused(Exception):
    """The prompt cannot run: ComfyUI's `error` object and `node_errors`."""

    def __init__(
        self,
        kind: str,
        message: str,
        details: str = "",
        extra_info: Mapping[str, Any] | None = None,
        node_errors: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(f"{message} {details}".strip())
        self.error = {"type": kind, "message": message, "details": details, "extra_info": dict(extra_info or {})}
        self.node_errors = dict(node_errors or {})


@dataclass(frozen=True, kw_only=True)
class CheckedPrompt:
    """A prompt that can run: the outputs whose whole upstream is right, and what is wrong with the others."""

    outputs: list[str]
    node_errors: dict[str, Any] = field(default_factory=dict)


def check_prompt(
    prompt: Prompt,
    declarations: Mapping[str, Declaration],
    folders: Folders,
    targets: Collection[str] | None = None,
) -> CheckedPrompt:
    """Which outputs can run. Raises PromptRefused when none can. Changes constants in place to their input's type."""
    outputs = _output_nodes(prompt, declarations, targets)
    if not outputs:
        raise PromptRefused("prompt_no_outputs", "Prompt has no outputs")
    checker = _Checker(prompt, declarations, folders)
    good = []
    for output in outputs:
        checker.walk(output)
        if checker.is_good[output]:
            good.append(output)
    if good:
        _check_unreached(prompt, checker.is_good)
        return CheckedPrompt(outputs=good, node_errors=checker.node_errors(outputs))
    details = "\n".join(
        f"{problem['message']}: {problem['details']}" for output in outputs for problem in checker.problems[output]
    )
    raise PromptRefused(
        "prompt_outputs_failed_validation",
        "Prompt outputs failed validation",
        details or checker.cycle_details,
        node_errors=checker.node_errors(outputs),
    )


def _output_nodes(
    prompt: Prompt, declarations: Mapping[str, Declaration], targets: Collection[str] | None
) -> list[str]:
    if len(prompt) > MAX_NODES:
        raise PromptRefused("invalid_prompt", f"Cannot execute {len(prompt)} nodes, the limit is {MAX_NODES}.")
    outputs = []
    for node_id, node in prompt.items():
        where = f"Node ID '#{node_id}'"
        if not isinstance(node, dict) or "class_type" not in node:
            raise PromptRefused(
                "invalid_prompt", "Cannot execute because a node is missing the class_type property.", where
            )
        if reason := unfit_value(node, MAX_DEPTH):
            raise PromptRefused("invalid_prompt", f"Cannot execute because a node is {reason}.", where)
        class_type = node["class_type"]
        declaration = declarations.get(class_type) if isinstance(class_type, str) else None
        if declaration is None:
            raise PromptRefused(
                "invalid_prompt",
                f"Cannot execute because node {class_type} does not exist.",
                where,
                {
                    "node_id": node_id,
                    "class_type": class_type,
                    "hint": HINT,
                    "nearest": nearest(class_type, declarations, cutoff=0.6),
                },
            )
        if declaration.is_output and (targets is None or node_id in targets):
            outputs.append(node_id)
    return outputs


def _check_unreached(prompt: Prompt, reached: Collection[str]) -> None:
    """Nodes that no output needs are not run, but they must not be poison either."""
    for node_id, node in prompt.items():
        if node_id in reached:
            continue
        inputs = node.get("inputs")
        if not isinstance(inputs, dict):
            raise PromptRefused(
                "invalid_prompt", "Cannot execute because a node has no inputs object.", f"Node ID '#{node_id}'"
            )


class _Checker:
    """Walks upstream from outputs, each node once, its sources before itself; never recurses."""

    def __init__(self, prompt: Prompt, declarations: Mapping[str, Declaration], folders: Folders) -> None:
        self._prompt = prompt
        self._declarations = declarations
        self._folders = folders
        self._dependents: dict[str, list[str]] = {}
        self._entered_by: dict[str, tuple[str, str, list[Any]]] = {}  # (node, input, link) that reached a node first
        self.problems: dict[str, list[dict[str, Any]]] = {}
        self.is_good: dict[str, bool] = {}
        self.cycle_details = ""

    def walk(self, output: str) -> None:
        on_path: dict[str, Iterator[tuple[str, list[Any]]]] = {output: self._sources(output)}
        while on_path:
            node_id = next(reversed(on_path))
            step = next(on_path[node_id], None)
            if step is None:
                del on_path[node_id]
                if node_id not in self.is_good:
                    self._check_node(node_id)
                continue
            name, link = step
            source = link[0]
            if source in on_path:
                self._refuse_cycle(source)
                continue
            if source not in self.is_good:
                self._entered_by[source] = (node_id, name, link)
                on_path[source] = self._sources(source)
        reached = self._upstream(output)
        for node_id in reached:
            if self.problems.get(node_id):
                self._dependents.setdefault(node_id, []).append(output)

    def _upstream(self, output: str) -> list[str]:
        seen = {output: None}
        stack = [output]
        while stack:
            for _, link in self._sources(stack.pop()):
                if link[0] not in seen:
                    seen[link[0]] = None
                    stack.append(link[0])
        return list(seen)

    def _sources(self, node_id: str) -> Iterator[tuple[str, list[Any]]]:
        """(input name, link) of the node's declared inputs that lead to a node of the prompt."""
        node = self._prompt[node_id]
        inputs = node.get("inputs")
        if not isinstance(inputs, dict):
            return
        for name in self._declarations[node["class_type"]].inputs:
            value = inputs.get(name)
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in self._prompt:
                yield name, value

    def _refuse_cycle(self, node_id: str) -> None:
        class_type = self._prompt[node_id]["class_type"]
        self.cycle_details = f"Node {node_id} ({class_type}) depends on itself: the links form a cycle"
        self.problems[node_id] = [
            {"type": "dependency_cycle", "message": "Dependency cycle", "details": self.cycle_details, "extra_info": {}}
        ]
        self.is_good[node_id] = False

    def _check_node(self, node_id: str) -> None:
        node = self._prompt[node_id]
        try:
            problems, sources_good = self._check_inputs(node)
        except _BadLink as bad:
            # ComfyUI tells these apart by where the exception surfaced: on the output itself, or deeper.
            problems, sources_good = [self._exception_problem(node_id, bad)], True
        self.problems[node_id] = problems
        self.is_good[node_id] = not problems and sources_good

    def _check_inputs(self, node: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bool]:
        inputs = node.get("inputs")
        if not isinstance(inputs, dict):
            raise _BadLink("KeyError", "'inputs'")
        declaration = self._declarations[node["class_type"]]
        problems: list[dict[str, Any]] = []
        sources_good = True
        ordered = sorted(declaration.inputs.items(), key=lambda item: not item[1].required)
        for name, declared in ordered:
            if name not in inputs:
                if declared.required:
                    problems.append(
                        complaint("required_input_missing", "Required input is missing", name, {"input_name": name})
                    )
                continue
            value = inputs[name]
            if isinstance(value, list):
                problem = self._check_link(name, value, node["class_type"])
                if problem is not None:
                    problems.append(problem)
                elif not self.is_good.get(value[0], False):
                    sources_good = False
                continue
            converted, problem = check_constant(name, declared, value, self._folders)
            if problem is not None:
                problems.append(problem)
            else:
                inputs[name] = converted
        return problems, sources_good

    def _check_link(self, name: str, link: list[Any], class_type: str) -> dict[str, Any] | None:
        declared = self._declarations[class_type].inputs[name]
        if len(link) != 2:
            return complaint(
                "bad_linked_input",
                "Bad linked input, must be a length-2 list of [node_id, slot_index]",
                name,
                {"input_name": name, "input_config": self._config(class_type, name), "received_value": link},
            )
        source, index = link
        if isinstance(source, list | dict):
            raise _BadLink("TypeError", f"unhashable type: '{type(source).__name__}'")
        if not isinstance(source, str) or source not in self._prompt:
            raise _BadLink("KeyError", repr(source))
        given = self._declarations[self._prompt[source]["class_type"]].outputs
        if not isinstance(index, int) or isinstance(index, bool):
            raise _BadLink("TypeError", f"tuple indices must be integers or slices, not {type(index).__name__}")
        if not -len(given) <= index < len(given):
            raise _BadLink("IndexError", "tuple index out of range")
        received = given[index]
        if received == declared.kind or "*" in (received, declared.kind):
            return None
        config = self._config(class_type, name)
        return complaint(
            "return_type_mismatch",
            "Return type mismatch between linked nodes",
            f"{name}, received_type({received}) mismatch input_type({config[0]})",
            {
                "input_name": name,
                "input_config": config,
                "received_type": received,
                "linked_node": link,
            },
        )

    def _exception_problem(self, node_id: str, bad: _BadLink) -> dict[str, Any]:
        facts: dict[str, Any] = {"exception_type": bad.exception_type, "traceback": []}
        if node_id not in self._entered_by:
            return complaint("exception_during_validation", "Exception when validating node", bad.details, facts)
        entering, name, link = self._entered_by[node_id]
        return complaint(
            "exception_during_inner_validation",
            "Exception when validating inner node",
            bad.details,
            {
                "input_name": name,
                "input_config": self._config(self._prompt[entering]["class_type"], name),
                "exception_message": bad.details,
                **facts,
                "linked_node": link,
            },
        )

    def _config(self, class_type: str, name: str) -> list[Any]:
        declared = self._declarations[class_type].inputs[name]
        return input_config(declared, self._folders, by_schema=class_type in BY_SCHEMA)

    def node_errors(self, outputs: list[str]) -> dict[str, Any]:
        return {
            node_id: {
                "errors": problems,
                "dependent_outputs": [output for output in outputs if output in self._dependents.get(node_id, ())],
                "class_type": self._prompt[node_id]["class_type"],
            }
            for node_id, problems in self.problems.items()
            if problems
        }


class _BadLink(Exception):
    def __init__(self, exception_type: str, details: str) -> None:
        super().__init__(details)
        self.exception_type = exception_type
        self.details = details
