"""What the known command line asks of a market before and while it rents, answered by this fleet. Pure.

Machines are offers, the scores of workers are benchmarks, a worker is an instance. Queries are `{field: {operator:
value}}`; a field that nobody knows anything about is not judged, as with a workergroup's `search_params`. Memory of
GPUs is in MB here, prices are per hour.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from comfyfleet.control.catalog import Catalog
from comfyfleet.control.fleet.base import FleetNode
from comfyfleet.control.fleet.needs import gpus_wanted, holds, is_fit
from comfyfleet.control.records import Template
from comfyfleet.control.worker import Worker
from comfyfleet.control.worker_states import ACTIVE

Row = dict[str, Any]
_MB_IN_GB = 1000.0


def asked(query: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The clauses of a query; what is none (order, limit, type) is left out."""
    return {name: dict(clauses) for name, clauses in query.items() if isinstance(clauses, Mapping)}


def is_match(row: Row, query: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether every clause holds of what is known."""
    return all(
        holds(row[name], operator, wanted)
        for name, clauses in query.items()
        if row.get(name) is not None
        for operator, wanted in clauses.items()
    )


def offers(nodes: Iterable[FleetNode], query: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """One for each machine that has what is asked: a workergroup with that search would start workers there."""
    search = {name: clauses for name, clauses in query.items() if name != "gpu_ram"}  # in GB there
    found = []
    for number, node in enumerate(nodes, 1):
        count = gpus_wanted(query) if "num_gpus" in query else node.gpus
        row = _offer(number, node, count)
        if node.is_alive and is_fit(search, node) and is_match(row, query):
            found.append(row)
    return found


def _offer(number: int, node: FleetNode, count: float) -> Row:
    """What is not known is null. There is no market: every offer is verified, on demand, and nobody else's."""
    ram_mb = round(node.gpu_ram_gb * _MB_IN_GB) or None
    has_room = node.free_gpus >= count
    price = node.price_hour * count / node.gpus if node.gpus else node.price_hour
    return {
        "id": number,
        "machine_id": number,
        "hostname": node.name,
        "public_ipaddr": node.address,
        "gpu_name": node.gpu_name or None,
        "num_gpus": count,
        "gpu_ram": ram_mb,
        "gpu_total_ram": round(ram_mb * count) if ram_mb else None,
        "dph_base": price,
        "dph_total": price,
        "verified": True,
        "external": False,
        "rentable": has_room,
        "rented": not has_room,
    }


def benchmarks(workers: Iterable[Worker], catalog: Catalog, query: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The score of each worker that has one, newest first."""
    found = []
    for worker in workers:
        group = catalog.workergroup(worker.group_id)
        template = catalog.template(group.template_hash) if group is not None else None
        row: Row = {
            "id": worker.id,
            "type": "perf",
            "gpu_name": worker.gpu_name,
            "num_gpus": 1,
            "template_hash": template.hash_id if template is not None else "",
            "template_id": template.id if template is not None else 0,
            "value": worker.measured_perf,
            "last_update": worker.last_report_at,
            "dph_base": worker.price_hour,
        }
        if worker.measured_perf > 0 and worker.gpu_name and is_match(row, query):
            found.append(row)
    return sorted(found, key=lambda row: -row["last_update"])


def instance(worker: Worker) -> Row:
    """A worker under the name that its machine has on a market."""
    return {
        "id": worker.id,
        "machine_id": worker.id,
        "actual_status": "running" if worker.state in ACTIVE else "exited",
        "gpu_name": worker.gpu_name or None,
        "num_gpus": 1,
        "dph_base": worker.price_hour,
        "dph_total": worker.price_hour,
        "start_date": worker.started_at or worker.created_at,
        "extra_env": [],
    }


def template_rows(templates: Iterable[Template], query: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """As listings show them: `extra_filters` is JSON in a string, which is how the command line reads it."""
    rows = [msgspec.structs.asdict(template) for template in templates]
    return [
        {**row, "extra_filters": msgspec.json.encode(row["extra_filters"]).decode()}
        for row in rows
        if is_match(row, query)
    ]
