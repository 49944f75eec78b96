"""What the OpenAPI page says about the hot routes: the documents' request and answer, by hand."""

from __future__ import annotations

from typing import Any

_S3 = {
    "type": "object",
    "description": "S3 for this request instead of the environment's; empty strings mean “not given”.",
    "properties": {
        "access_key_id": {"type": "string"},
        "secret_access_key": {"type": "string"},
        "endpoint_url": {"type": "string"},
        "bucket_name": {"type": "string"},
        "region": {"type": "string"},
        "connect_timeout": {"type": "number"},
        "connect_attempts": {"type": "integer"},
    },
}
_WEBHOOK = {
    "type": "object",
    "properties": {
        "url": {"type": "string"},
        "extra_params": {"type": "object"},
        "secret": {"type": "string"},
        "timeout": {"type": "number"},
        "events": {"type": "array", "items": {"type": "string"}},
    },
}
_INPUT = {
    "type": "object",
    "properties": {
        "request_id": {
            "type": "string",
            "maxLength": 128,
            "description": "Yours: a repeat with the same id joins or replays the job.",
        },
        "workflow_json": {"type": "object", "description": "A workflow in ComfyUI's API format."},
        "modifier": {"type": "string", "description": "The name of a workflow template, instead of workflow_json."},
        "modifications": {"type": "object", "description": "Values of the template's parameters."},
        "s3": _S3,
        "webhook": _WEBHOOK,
        "credentials": {
            "type": "array",
            "description": "Headers for input URLs at or below a prefix, and for no other host.",
            "items": {
                "type": "object",
                "required": ["url_prefix"],
                "properties": {"url_prefix": {"type": "string"}, "headers": {"type": "object"}},
            },
        },
        "return_outputs_as_base64": {"type": "boolean"},
        "deadline_s": {"type": "number", "minimum": 0, "description": "Stop the job after so many seconds."},
        "max_queue_wait_s": {"type": "number", "minimum": 0, "description": "Give up if it waits longer."},
        "force": {"type": "boolean", "description": "Render again even if the engine has the result cached."},
        "expires_s": {"type": "number", "minimum": 0, "description": "How long links stay valid."},
    },
}
GENERATE_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {"type": "object", "required": ["input"], "properties": {"input": _INPUT}},
            "example": {
                "input": {
                    "workflow_json": {
                        "1": {
                            "class_type": "EmptyImage",
                            "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255},
                        },
                        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "blue"}},
                    }
                }
            },
        }
    },
}
_RESULT = {
    "type": "object",
    "required": ["id", "message", "status", "comfyui_response", "output", "timings"],
    "properties": {
        "id": {"type": "string"},
        "message": {"type": "string"},
        "status": {"type": "string"},
        "comfyui_response": {"type": "object"},
        "output": {"type": "array", "items": {"type": "object"}},
        "timings": {"type": "object"},
        "miniature": {"type": "boolean"},
        "reused": {"type": "boolean"},
        "error": {"type": "object"},
    },
}


def _result(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _RESULT}}}


_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: _result("Not JSON, or not the shape."),
    401: _result("A key is needed."),
    403: _result("Not from this machine, or from a web page."),
    404: _result("No such template."),
    409: _result("What this request joined went away."),
    413: _result("The body is too large."),
    422: _result("No retry can help: a refused workflow, a failed job, an id used with another body."),
    499: _result("The job was cancelled."),
    503: _result("Full, draining or without an engine; `Retry-After` says when."),
    507: _result("The disk is full."),
}
GENERATE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The result.",
        "content": {"application/json": {"schema": _RESULT}, "text/event-stream": {"schema": {"type": "string"}}},
    },
    202: _result("Accepted."),
    **_REFUSALS,
}
RESULT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The result.", "content": {"application/json": {"schema": {"type": "object"}}}},
    202: _result("Not finished yet."),
    **{status: _REFUSALS[status] for status in (400, 401, 403, 422, 499, 503, 507)},
    404: _result("There is no such job."),
}
