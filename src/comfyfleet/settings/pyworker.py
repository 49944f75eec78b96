"""Whose worker code runs: `PYWORKER_REPO`, `PYWORKER_REF`, `BACKEND`; ours `COMFYFLEET_PYWORKER_PYTHON`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PyworkerSettings:
    """python: an interpreter that has the framework already; "" makes an environment of its own for the clone."""

    repository: str
    ref: str
    backend: str
    python: str


def pyworker_settings(env: Mapping[str, str]) -> PyworkerSettings | None:
    """None when `PYWORKER_REPO` is unset: then the built-in agent serves."""
    repository = env.get("PYWORKER_REPO", "").strip()
    if not repository:
        return None
    return PyworkerSettings(
        repository=repository,
        ref=env.get("PYWORKER_REF", "").strip(),
        backend=env.get("BACKEND", "").strip() or "comfyui-json",
        python=env.get("COMFYFLEET_PYWORKER_PYTHON", "").strip(),
    )
