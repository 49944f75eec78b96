"""From a run's end to the answer: the documents' result, field for field, then ours. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from comfyfleet.wire.errors import FleetError
from comfyfleet.wire.generation import GenerateResult, OutputEntry
from comfyfleet.wire.jobs import RunStatus
from comfyfleet.worker.engines.client import HistoryEntry
from comfyfleet.worker.engines.faults import without_paths
from comfyfleet.worker.job import MESSAGES, Finished, Job
from comfyfleet.worker.stages.prepare import NONCE

_encode = msgspec.json.Encoder().encode


def finished(
    job: Job,
    *,
    entry: HistoryEntry | None,
    outputs: list[OutputEntry],
    error: FleetError | None,
    now: float,
    full: bool,
) -> Finished:
    """The end of `job`, encoded. `full`: with ComfyUI's own words (the documents' default)."""
    if error is None:
        status, http_status, message = RunStatus.COMPLETED, 200, MESSAGES[RunStatus.COMPLETED]
    else:
        status = RunStatus.CANCELLED if error.status == 499 else RunStatus.FAILED
        http_status, message = error.status, error.message
    result = GenerateResult(
        id=job.id,
        message=message,
        status=status.value,
        comfyui_response=comfyui_response(job, entry, error) if full else {},
        output=outputs,
        timings=timings(job, now),
        miniature=bool(entry is not None and entry.meta.get("miniature")),
        reused=error is None and entry is not None and was_reused(entry),
    )
    if error is not None:
        result.error = error.as_dict()
    return Finished(
        status=status,
        http_status=http_status,
        body=_encode(result),
        retry_after_s=error.retry_after_s if error is not None else None,
    )


def comfyui_response(job: Job, entry: HistoryEntry | None, error: FleetError | None) -> dict[str, Any]:
    """`{prompt_id: history entry, "execution_details": {…}}`; what is ours or the server's in it is taken out."""
    answer: dict[str, Any] = {}
    if entry is not None:
        answer[job.prompt_id] = {
            "prompt": _as_sent(entry.prompt),
            "outputs": entry.outputs,
            "status": _without_traces(entry.status),
            "meta": entry.meta,
        }
    if job.watch is not None:
        answer["execution_details"] = job.watch.details(
            completed=error is None, error=None if error is None else error.message
        )
    return answer


def was_reused(entry: HistoryEntry) -> bool:
    """True when every output came from the engine's cache: nothing was rendered for this job."""
    cached = set((entry.message("execution_cached") or {}).get("nodes", ()))
    return bool(entry.outputs) and set(entry.outputs) <= cached


def timings(job: Job, now: float) -> dict[str, Any]:
    """Milliseconds of each part; stamps are epoch milliseconds."""
    stamps = job.stamps
    started = stamps.get(RunStatus.PROCESSING, now)
    generating = stamps.get(RunStatus.GENERATING, now)
    generated = stamps.get(RunStatus.GENERATED, now)
    return {
        "queued_at_ms": int(job.accepted_at * 1000),
        "queue_ms": _ms(started - job.accepted_at),
        "preprocess_ms": _ms(generating - started),
        "generation_ms": _ms(generated - generating),
        "postprocess_ms": _ms(now - generated),
        "completed_at_ms": int(now * 1000),
        "total_ms": _ms(now - job.accepted_at),
    }


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 1)


def _as_sent(prompt: list[Any]) -> list[Any]:
    """The engine's prompt item, its graph without the nonce that we may have put in."""
    if len(prompt) < 3 or not isinstance(prompt[2], Mapping):
        return prompt
    graph = {
        node_id: {**node, "inputs": {name: value for name, value in node["inputs"].items() if name != NONCE}}
        if NONCE in node.get("inputs", ())
        else node
        for node_id, node in prompt[2].items()
    }
    return [*prompt[:2], graph, *prompt[3:]]


def _without_traces(status: dict[str, Any]) -> dict[str, Any]:
    """A history's status with tracebacks and server paths out of its error message."""
    messages = status.get("messages", [])
    if status.get("status_str") == "success":
        return status
    cleaned = [
        [kind, {name: _clean(value) for name, value in data.items() if name not in ("traceback", "current_outputs")}]
        if kind == "execution_error"
        else [kind, data]
        for kind, data in messages
    ]
    return {**status, "messages": cleaned}


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    if isinstance(value, dict):
        return {name: _clean(inner) for name, inner in value.items()}
    return value
