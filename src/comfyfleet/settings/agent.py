"""Settings of the agent: the environment that a fleet gives its workers, names as public workers know them.

`CONTAINER_ID`, `REPORT_ADDR`, `MASTER_TOKEN`, `WORKER_PORT`, `VAST_TCP_PORT_<port>`, `PUBLIC_IPADDR`, `USE_SSL`,
`UNSECURED`, `BENCHMARK_JSON_PATH`; ours begin with `COMFYFLEET_`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from comfyfleet.wire.errors import BadRequest

_TRUE = frozenset({"1", "true", "yes", "on", "y", "t"})


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """report_urls: control planes, tried in turn. url: what is reported and bound into tickets."""

    worker_id: int
    report_urls: tuple[str, ...]
    mtoken: str
    host: str
    port: int
    side_port: int  # plain http, for a webhook on this machine that ends a session
    url: str
    endpoint: str
    incarnation: str
    template: str
    benchmark_json: Path | None
    benchmark_limit_s: float | None  # None: what the template says
    is_unsecured: bool
    max_sessions: int


def agent_settings(env: Mapping[str, str]) -> AgentSettings | None:
    """None when no fleet is named (`REPORT_ADDR` unset): then this is a plain wrapper. Raises BadRequest by name."""
    report_addr = env.get("REPORT_ADDR", "")
    if not report_addr:
        return None
    port = _integer(env, "WORKER_PORT", 3000)
    outside = env.get(f"VAST_TCP_PORT_{port}", str(port))
    scheme = "https" if env.get("USE_SSL", "false").lower() in _TRUE else "http"
    benchmark_json = env.get("BENCHMARK_JSON_PATH", "")
    return AgentSettings(
        worker_id=_integer(env, "CONTAINER_ID", None),
        report_urls=tuple(part.strip().rstrip("/") for part in report_addr.split(",") if part.strip()),
        mtoken=env.get("MASTER_TOKEN", ""),
        host=env.get("COMFYFLEET_WORKER_HOST", "127.0.0.1"),
        port=port,
        side_port=_integer(env, "WORKER_HTTP_PORT", port + 1),
        url=f"{scheme}://{env.get('PUBLIC_IPADDR', '127.0.0.1')}:{outside}",
        endpoint=env.get("COMFYFLEET_ENDPOINT", ""),
        incarnation=env.get("COMFYFLEET_INCARNATION", ""),
        template=env.get("COMFYFLEET_TEMPLATE", "local"),
        benchmark_json=Path(benchmark_json) if benchmark_json else None,
        benchmark_limit_s=float(limit_s) if (limit_s := env.get("COMFYFLEET_BENCHMARK_LIMIT_S")) else None,
        is_unsecured=env.get("UNSECURED", "false").lower() in _TRUE,
        max_sessions=_integer(env, "COMFYFLEET_MAX_SESSIONS", 10),
    )


def _integer(env: Mapping[str, str], name: str, default: int | None) -> int:
    given = env.get(name, "")
    if not given and default is not None:
        return default
    try:
        return int(given)
    except ValueError as error:
        raise BadRequest(f"{name} must be a whole number, not {given!r}", field=name) from error
