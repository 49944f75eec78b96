"""What the control plane remembers, as frozen values: endpoints, workergroups, templates, keys, workers, decisions.

Not the durable jobs (`control.jobs`) and not live measurements (`control.workers`). A record changes only through the
store; everybody else holds copies. Field names are the wire's where a user sees them (`endptjobs`, `autojobs`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec


class EndpointState(StrEnum):
    """active: managed. suspended: workers run on, nothing starts or stops. stopped: all inactive."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    STOPPED = "stopped"
    DESTROYED = "destroyed"


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint and its scaling policy. Loads are load/s, times seconds; defaults are the SDK's own bodies'.

    inactivity_timeout: >0 idle seconds before zero is allowed, 0 no gate, <0 never to zero, None not applied.
    key_generation: the derived endpoint key changes with it.
    """

    id: int
    endpoint_name: str
    created_at: float
    user_id: int = 1
    cold_workers: int = 5
    max_workers: int = 20
    min_load: float = 0.0
    min_cold_load: float = 0.0
    target_util: float = 0.9
    cold_mult: float = 2.5
    max_queue_time: float = 30.0
    target_queue_time: float = 10.0
    inactivity_timeout: float | None = None
    endpoint_state: EndpointState = EndpointState.ACTIVE
    autoscaler_instance: str = "prod"
    key_generation: int = 1
    deleted_at: float | None = None  # set while it drains; the record goes when the last worker is gone


class Workergroup(msgspec.Struct, frozen=True, kw_only=True):
    """What kind of worker an endpoint recruits. search_query: `{field: {op: value}}`.

    The five load fields are accepted and shown at this level and used at the endpoint's, as in the original.
    update_generation grows with each rolling update; a worker of an older one is to be updated.
    """

    id: int
    endpoint_id: int
    endpoint_name: str
    created_at: float
    user_id: int = 1
    template_hash: str = ""
    template_id: int | None = None
    search_params: str = ""
    search_query: dict[str, Any] = {}
    launch_args: str = ""
    gpu_ram: float = 24.0
    test_workers: int = 3
    min_load: float = 1.0
    min_cold_load: float = 0.0
    target_util: float = 0.9
    cold_mult: float = 3.0
    cold_workers: int = 3
    max_workers: int = 20
    autoscaler_instance: str = "prod"
    update_generation: int = 0
    is_updating: bool = False
    deleted_at: float | None = None


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker is set up; `hash_id` is the content's hash, so it changes with any field. Field names are vast's."""

    id: int
    hash_id: str
    created_at: float
    name: str = ""
    image: str = ""
    tag: str = ""
    href: str = ""
    repo: str = ""
    env: str = ""
    onstart: str = ""
    runtype: str = "args"
    ssh_direct: bool = False
    jup_direct: bool = False
    use_ssh: bool = False
    use_jupyter_lab: bool = False
    jupyter_dir: str = ""
    docker_login_repo: str = ""
    extra_filters: dict[str, Any] = {}
    recommended_disk_space: float = 0.0
    readme: str = ""
    readme_visible: bool = True
    desc: str = ""
    private: bool = True
    args_str: str = ""
    volume_info: dict[str, Any] | None = None


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one key may use; 0 is no limit. weight: its part in fair sharing."""

    requests_per_s: float = 0.0
    burst: float = 0.0
    max_waiting_jobs: int = 0
    gpu_seconds_per_day: float = 0.0
    weight: float = 1.0


class ScopeUse(msgspec.Struct, frozen=True, kw_only=True):
    """Requests and GPU-seconds of one key: a sum over all replicas, or what is to be added to it."""

    scope: str
    requests: float = 0.0
    seconds: float = 0.0


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A made key. Only its SHA-256 is kept: a key has 256 random bits, so a fast hash is enough."""

    id: str
    name: str
    digest: str
    scopes: tuple[str, ...]
    endpoint_ids: tuple[int, ...] = ()  # empty: all
    created_at: float = 0.0
    expires_at: float | None = None
    limits: KeyLimits = KeyLimits()


class AccountVariable(msgspec.Struct, frozen=True, kw_only=True):
    """A variable given to every worker that starts. `sealed` is the value, encrypted at rest."""

    name: str
    sealed: str
    is_secret: bool = True
    updated_at: float = 0.0


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """A worker across restarts. `body` is JSON of what its owner (`control.workers`) wants to find again."""

    id: int
    endpoint_id: int
    workergroup_id: int
    body: str


class LearnedRow(msgspec.Struct, frozen=True, kw_only=True):
    """Costs of the last jobs of one workflow shape at one endpoint, oldest first. id: "endpoint:shape"."""

    id: str
    endpoint_id: int
    shape: str
    costs: tuple[float, ...]


class DemandRow(msgspec.Struct, frozen=True, kw_only=True):
    """What arrived at an endpoint lately, as `demand` measures it: (second, load units) each. id: the endpoint's."""

    id: int
    last_arrival_at: float
    buckets: tuple[tuple[float, float], ...]
    mean_cost: float = 0.0


class DecisionRow(msgspec.Struct, frozen=True, kw_only=True):
    """One scaling decision with its inputs: enough to replay it. `inputs` and `outcome` are JSON."""

    id: int
    endpoint_id: int
    at: float
    sentence: str
    inputs: str
    outcome: str


class LogRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of an endpoint's or workergroup's log. level: info0, info1, trace or debug."""

    endpoint_id: int
    workergroup_id: int
    at: float
    level: str
    text: str


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds a worker spent in a billing state (or a job used), and what they cost."""

    endpoint_id: int
    workergroup_id: int
    worker_id: int
    scope: str
    kind: str  # gpu | storage: of a worker; job | request: of a key
    started_at: float
    seconds: float
    price: float
