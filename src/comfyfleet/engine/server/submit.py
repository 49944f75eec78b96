"""`POST /prompt`: a body rebuilt into a prompt that cannot hurt, checked, numbered and queued.

Where ComfyUI answers 200 and dies, or answers 500 in plain text, the answer is a 400 in its error shape.
"""

from __future__ import annotations

import math
from typing import Any

from comfyfleet.engine.graph import PromptRefused, check_prompt
from comfyfleet.engine.server.engine import Engine
from comfyfleet.engine.server.prompts import QueuedPrompt
from comfyfleet.wire.workflow import unfit_value


def submit(engine: Engine, body: object) -> dict[str, Any]:
    """Queue a prompt; the answer's body. Raises PromptRefused."""
    if not isinstance(body, dict) or body.get("prompt") is None:
        raise PromptRefused("no_prompt", "No prompt provided", "No prompt provided")
    number = _number(engine, body)
    prompt, prompt_id = body["prompt"], _prompt_id(engine, body)
    extra_data = _extra_data(body)
    if prompt == []:
        prompt = {}
    if not isinstance(prompt, dict):
        raise PromptRefused("invalid_prompt", "The prompt must be an object of nodes.", "prompt")
    targets = body.get("partial_execution_targets")
    if targets is not None and not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)):
        raise PromptRefused("invalid_prompt", "partial_execution_targets must be a list of node ids.")
    checked = check_prompt(prompt, engine.declarations, engine.folders, targets)
    engine.queue.put(
        QueuedPrompt(number=number, prompt_id=prompt_id, prompt=prompt, extra_data=extra_data, outputs=checked.outputs)
    )
    engine.tell_status()
    return {"prompt_id": prompt_id, "number": number, "node_errors": checked.node_errors}


def _number(engine: Engine, body: dict[str, Any]) -> float:
    if "number" not in body:
        return engine.queue.next_number(front=bool(body.get("front")))
    try:
        number = float(body["number"])
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise PromptRefused("invalid_prompt", "number must be a finite number.", "number")
    return number


def _prompt_id(engine: Engine, body: dict[str, Any]) -> str:
    given = body.get("prompt_id")
    if given is None:
        return engine.ids.request_id()
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise PromptRefused("invalid_prompt", "prompt_id must be text.", "prompt_id")
    return str(given)


def _extra_data(body: dict[str, Any]) -> dict[str, Any]:
    given = body.get("extra_data", {})
    if not isinstance(given, dict):
        raise PromptRefused("invalid_prompt", "extra_data must be an object.", "extra_data")
    if reason := unfit_value(given):
        raise PromptRefused("invalid_prompt", f"extra_data is {reason}.", "extra_data")
    if not isinstance(given.get("extra_pnginfo", {}) or {}, dict):
        raise PromptRefused("invalid_prompt", "extra_data.extra_pnginfo must be an object.", "extra_data.extra_pnginfo")
    extra_data = dict(given)
    for place, value in (("extra_data.client_id", given.get("client_id")), ("client_id", body.get("client_id"))):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise PromptRefused("invalid_prompt", f"{place} must be text.", place)
        extra_data["client_id"] = str(value)
    return extra_data
