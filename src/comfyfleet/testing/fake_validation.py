"""How the fake engine refuses a graph: ComfyUI's error shapes, its order and its peculiarities (a 200 with
`node_errors` when one output of several is bad; what no output needs is not looked at)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from comfyfleet.testing.fake_nodes import NODES, convert


@dataclass(kw_only=True)
class Verdict:
    """error is ComfyUI's `error` object, or None when the prompt may run its `good_outputs`."""

    error: dict[str, Any] | None = None
    node_errors: dict[str, Any] = field(default_factory=dict)
    good_outputs: list[str] = field(default_factory=list)


def problem(kind: str, message: str, details: str = "", **extra_info: Any) -> dict[str, Any]:
    return {"type": kind, "message": message, "details": details, "extra_info": extra_info}


def validate(prompt: Mapping[str, Any]) -> Verdict:
    """ComfyUI's verdict on a graph. Raises what makes a real one answer 500 (a null node)."""
    outputs = []
    for node_id, node in prompt.items():
        if "class_type" not in node:
            message = "Cannot execute because a node is missing the class_type property."
            return Verdict(error=problem("invalid_prompt", message, f"Node ID '#{node_id}'"))
        if node["class_type"] not in NODES:
            message = f"Cannot execute because node {node['class_type']} does not exist."
            return Verdict(error=problem("invalid_prompt", message, f"Node ID '#{node_id}'"))
        if NODES[node["class_type"]].is_output:
            outputs.append(node_id)
    if not outputs:
        return Verdict(error=problem("prompt_no_outputs", "Prompt has no outputs"))

    verdict = Verdict()
    seen: dict[str, list[dict[str, Any]]] = {}
    details: list[str] = []
    for output in outputs:
        try:
            bad = [node_id for node_id in _upstream(prompt, output) if _errors(prompt, node_id, seen)]
        except RecursionError:
            bad = [output]
        if not bad:
            verdict.good_outputs.append(output)
            continue
        for node_id in bad:
            entry = verdict.node_errors.setdefault(
                node_id,
                {
                    "errors": seen.get(node_id, []),
                    "dependent_outputs": [],
                    "class_type": prompt[node_id]["class_type"],
                },
            )
            entry["dependent_outputs"].append(output)
        details.extend(f"{error['message']}: {error['details']}" for error in seen.get(output, []))
    if not verdict.good_outputs:
        text = "\n".join(details)
        verdict.error = problem("prompt_outputs_failed_validation", "Prompt outputs failed validation", text)
    return verdict


def _upstream(prompt: Mapping[str, Any], node_id: str) -> list[str]:
    found: list[str] = []
    stack = [node_id]
    while stack:
        current = stack.pop()
        if current in found or current not in prompt:
            continue
        found.append(current)
        inputs = prompt[current].get("inputs")
        for value in inputs.values() if isinstance(inputs, dict) else ():
            if isinstance(value, list) and len(value) == 2:
                stack.append(value[0])
    return found


def _errors(prompt: Mapping[str, Any], node_id: str, seen: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    if node_id in seen:
        return seen[node_id]
    node = prompt[node_id]
    declared = NODES[node["class_type"]]
    found: list[dict[str, Any]] = []
    inputs = node.get("inputs")
    if not isinstance(inputs, dict):
        found.append(problem("exception_during_validation", "Exception when validating node", "inputs"))
        inputs = {}
    for name, kind in declared.inputs.items():
        if name not in inputs:
            found.append(problem("required_input_missing", "Required input is missing", name, input_name=name))
            continue
        value = inputs[name]
        facts = {"input_name": name, "input_config": [kind, {}], "received_value": value}
        if isinstance(value, list):
            if len(value) != 2:
                message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
                found.append(problem("bad_linked_input", message, name, **facts))
            elif value[0] not in prompt:
                found.append(problem("exception_during_validation", "Exception when validating node", f"'{value[0]}'"))
            else:
                produced = NODES[prompt[value[0]]["class_type"]].outputs
                if value[1] >= len(produced):
                    message = "Exception when validating node"
                    found.append(problem("exception_during_validation", message, "tuple index out of range"))
                elif produced[value[1]] != kind:
                    detail = f"{name}, received_type({produced[value[1]]}) mismatch input_type({kind})"
                    message = "Return type mismatch between linked nodes"
                    found.append(problem("return_type_mismatch", message, detail, **facts))
            continue
        try:
            inputs[name] = value = convert(kind, value)
        except (TypeError, ValueError) as error:
            message = f"Failed to convert an input value to a {kind} value"
            detail = f"{name}, {value}, {error}"
            found.append(problem("invalid_input_type", message, detail, **facts))
            continue
        low, high = (declared.limits or {}).get(name, (None, None))
        if low is not None and value < low:
            found.append(problem("value_smaller_than_min", f"Value {value} smaller than min of {low}", name, **facts))
        if high is not None and value > high:
            found.append(problem("value_bigger_than_max", f"Value {value} bigger than max of {high}", name, **facts))
        if name.endswith("_name") and str(value).startswith("missing"):
            detail = f"{name}: '{value}' not in ['present.safetensors']"
            found.append(problem("value_not_in_list", "Value not in list", detail, **facts))
    seen[node_id] = found
    return found
