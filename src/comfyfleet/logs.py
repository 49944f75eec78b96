"""structlog, set up once per process: pretty on a terminal, one JSON object a line otherwise.

An event is a dotted past-tense fact with values: `log.info("job.finished", job=id, run_s=7.2)`. Secrets are masked
here as a last line of defence, by key name; they should not get this far. `log_to` sends a copy to a file.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from functools import lru_cache
from typing import Any, TextIO

import structlog

_SECRET_KEY = re.compile(
    r"(secret|token|password|api_key|authorization|access_key|signature|credential)", re.IGNORECASE
)
_SECRET_QUERY = re.compile(r"((?:api_key|signature|X-Amz-[A-Za-z]+|token)=)[^&\s\"']+", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"secret|token|password|passwd|credential|(^|_)key(_id)?$", re.IGNORECASE)
_USERINFO = re.compile(r"(://)[^/\s@]+@")
_SHORTEST_SECRET = 6  # what is shorter stands in too many other words


def mask_secrets(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace values under secret-looking keys, and secret query parameters inside text values."""
    for key, value in event.items():
        if _names_a_secret(key) and value not in (None, ""):
            event[key] = "***"
        elif isinstance(value, str) and "=" in value:
            event[key] = _SECRET_QUERY.sub(r"\1***", value)
    return event


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """What a child said that had `environment`, without the values of its secret variables and the logins in URLs."""
    values = {value for name, value in environment.items() if _SECRET_VARIABLE.search(name)}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    return _SECRET_QUERY.sub(r"\1***", _USERINFO.sub(r"\1***@", text))


@lru_cache(maxsize=1024)  # the keys are those of the source
def _names_a_secret(key: str) -> bool:
    return _SECRET_KEY.search(key) is not None


def configure(*, level: str = "info", stream: TextIO | None = None) -> None:
    """Set the process's logging up; call once, in a composition root."""
    target = stream if stream is not None else sys.stderr
    pretty = target.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            mask_secrets,
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if pretty else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(file=target),
        cache_logger_on_first_use=True,
    )
