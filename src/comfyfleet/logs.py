"""structlog, set up once per process: pretty on a terminal, one JSON object a line otherwise.

An event is a dotted past-tense fact with values: `log.info("job.finished", job=id, run_s=7.2)`. Secrets are masked
here as a last line of defence, by key name; they should not get this far. `log_to` sends a copy to a file.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from functools import lru_cache
from typing import Any, TextIO

import structlog

_SECRET_KEY = re.compile(
    r"(secret|token|password|api_key|authorization|access_key|signature|credential)", re.IGNORECASE
)
_SECRET_QUERY = re.compile(r"((?:api_key|signature|X-Amz-[A-Za-z]+|token)=)[^&\s\"']+", re.IGNORECASE)


def mask_secrets(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace values under secret-looking keys, and secret query parameters inside text values."""
    for key, value in event.items():
        if _names_a_secret(key) and value not in (None, ""):
            event[key] = "***"
        elif isinstance(value, str) and "=" in value:
            event[key] = _SECRET_QUERY.sub(r"\1***", value)
    return event


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
