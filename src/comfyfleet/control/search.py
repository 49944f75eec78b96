"""`search_params`: the hardware filter of a workergroup, in the text form users type. Pure.

`gpu_ram>=24 gpu_name=RTX_4090 num_gpus in [1,2]` becomes `{"gpu_ram": {"gte": 24}, …}`. Sizes stay in the unit given.
"""

from __future__ import annotations

import re
from typing import Any

from comfyfleet.wire.errors import InvalidArguments

_OPERATORS = {
    ">=": "gte",
    "<=": "lte",
    "!=": "neq",
    "==": "eq",
    ">": "gt",
    "<": "lt",
    "=": "eq",
    "notin": "notin",
    "not in": "notin",
    "nin": "notin",
    "in": "in",
}
_CLAUSE = re.compile(
    r"\s*(?P<field>[A-Za-z_][\w.]*)\s*(?P<operator>>=|<=|!=|==|=|>|<|\bnot\s+in\b|\bnotin\b|\bnin\b|\bin\b)\s*"
    r"(?P<value>\[[^\]]*\]|\"[^\"]*\"|'[^']*'|[^\s]+)"
)


def parse_search(text: str) -> dict[str, dict[str, Any]]:
    """`{field: {operator: value}}`. Raises InvalidArguments showing what could not be read."""
    query: dict[str, dict[str, Any]] = {}
    at = 0
    while text[at:].strip():
        match = _CLAUSE.match(text, at)
        if match is None:
            raise InvalidArguments(f"search_params: cannot read {text[at:].strip()!r}", field="search_params")
        operator = _OPERATORS[re.sub(r"\s+", " ", match["operator"])]
        value = _value(match["value"])
        if value != "any":
            query.setdefault(match["field"], {})[operator] = value
        at = match.end()
    return query


def _value(text: str) -> Any:
    if text.startswith("["):
        return [_value(part.strip()) for part in text[1:-1].split(",") if part.strip()]
    if text[0] in "\"'":
        return text[1:-1]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.replace("_", " ")
