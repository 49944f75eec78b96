"""One input against its declaration: conversion, limits, lists, and how an input is described to clients.

The words and shapes are ComfyUI's, since clients show and parse them; what is ours stands under `extra_info.nearest`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from comfyfleet.engine.registry import Folders, Input, InputFiles, ModelFiles

MAX_LISTED_OPTIONS = 20  # longer lists are not repeated in an error


def complaint(kind: str, message: str, details: str, extra_info: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of a node's `errors`."""
    return {"type": kind, "message": message, "details": details, "extra_info": dict(extra_info)}


def options_of(declared: Input, folders: Folders) -> list[Any]:
    """What may be chosen now."""
    match declared.options:
        case ModelFiles(folder=folder, built_in=built_in):
            return [*folders.model_names(folder), *built_in]
        case InputFiles(media=media):
            return list(folders.input_names(media))
        case None:
            return []
        case listed:
            return list(listed)


def input_config(declared: Input, folders: Folders, *, by_schema: bool = False) -> list[Any]:
    """ComfyUI's description of an input: `[kind or options, {default, min, max, …}]`.

    Of a node declared by schema, a list is a "COMBO" and its options are among the facts.
    """
    facts: dict[str, Any] = {}
    if declared.default is not None:
        facts["default"] = declared.default
    if declared.minimum is not None:
        facts["min"] = declared.minimum
    if declared.maximum is not None:
        facts["max"] = declared.maximum
    facts.update(declared.details)
    if declared.options is None:
        return [declared.kind, facts]
    options = options_of(declared, folders)
    return [declared.kind, {**facts, "multiselect": False, "options": options}] if by_schema else [options, facts]


# What a graph may hold as a value in place; all else comes by a link.
_WRITTEN_KINDS = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "*"})


def check_constant(name: str, declared: Input, value: Any, folders: Folders) -> tuple[Any, dict[str, Any] | None]:
    """(the value in its input's type, what is wrong with it or None)."""
    if isinstance(value, dict) and "__value__" in value:
        value = value["__value__"]
    if declared.kind not in _WRITTEN_KINDS and (declared.required or value is not None):
        # ComfyUI lets it through, and fails when half the graph has run.
        return value, complaint(
            "bad_linked_input",
            "Bad linked input, must be a length-2 list of [node_id, slot_index]",
            f"{name}, only a link brings {declared.kind}",
            {"input_name": name, "input_config": input_config(declared, folders), "received_value": value},
        )
    try:
        converted = _convert(declared.kind, value)
    except (TypeError, ValueError, OverflowError) as error:
        problem = complaint(
            "invalid_input_type",
            f"Failed to convert an input value to a {declared.kind} value",
            f"{name}, {value}, {error}",
            {
                "input_name": name,
                "input_config": input_config(declared, folders),
                "received_value": value,
                "exception_message": str(error),
            },
        )
        return value, problem
    return converted, _check_limits(name, declared, converted, folders) or _check_list(
        name, declared, converted, folders
    )


def _convert(kind: str, value: Any) -> Any:
    if kind == "INT":
        return int(value)
    if kind == "FLOAT":
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"{value} is not a finite number")
        return number
    if kind == "STRING":
        return str(value)
    if kind == "BOOLEAN":
        return bool(value)
    return value


def _check_limits(name: str, declared: Input, value: Any, folders: Folders) -> dict[str, Any] | None:
    facts = {"input_name": name, "input_config": None, "received_value": value}
    if declared.minimum is not None and value < declared.minimum:
        facts["input_config"] = input_config(declared, folders)
        return complaint("value_smaller_than_min", f"Value {value} smaller than min of {declared.minimum}", name, facts)
    if declared.maximum is not None and value > declared.maximum:
        facts["input_config"] = input_config(declared, folders)
        return complaint("value_bigger_than_max", f"Value {value} bigger than max of {declared.maximum}", name, facts)
    return None


def _check_list(name: str, declared: Input, value: Any, folders: Folders) -> dict[str, Any] | None:
    if declared.options is None:
        return None
    options = options_of(declared, folders)
    if isinstance(declared.options, InputFiles):
        if isinstance(value, str) and folders.has_input(value):
            return None
        reason = f"{name} - {declared.options.refusal.format(value)}"
        facts = {"input_name": name, **_offer(value, options)}
        return complaint("custom_validation_failed", "Custom validation failed for node", reason, facts)
    if value in options:
        return None
    is_long = len(options) > MAX_LISTED_OPTIONS
    shown = f"(list of length {len(options)})" if is_long else str(options)
    return complaint(
        "value_not_in_list",
        "Value not in list",
        f"{name}: '{value}' not in {shown}",
        {
            "input_name": name,
            "input_config": None if is_long else input_config(declared, folders),
            "received_value": value,
            **_offer(value, options),
        },
    )


def nearest(value: Any, names: Iterable[Any], *, cutoff: float = 0.4) -> str | None:
    """The existing name most like the one asked for, or None where nothing comes close."""
    if not isinstance(value, str):
        return None
    found = difflib.get_close_matches(value, [name for name in names if isinstance(name, str)], n=1, cutoff=cutoff)
    return found[0] if found else None


def _offer(value: Any, names: Iterable[Any]) -> dict[str, str]:
    found = nearest(value, names)
    return {"nearest": found, "hint": f"did you mean '{found}'?"} if found is not None else {}
