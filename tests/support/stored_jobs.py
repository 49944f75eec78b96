"""Jobs and leases as the store's suites write them."""

from __future__ import annotations

from comfyfleet.control.jobs import Job, Lease, rank
from comfyfleet.wire.jobs import JobStatus

NOW = 1_700_000_000.0


def a_job(job_id: str = "j1", *, scope: str = "key:a", priority: int = 0, created_at: float = NOW, **fields) -> Job:
    values = {
        "id": job_id,
        "endpoint_id": 1,
        "scope": scope,
        "status": JobStatus.QUEUED,
        "priority": priority,
        "cost": 100.0,
        "rank": rank(created_at, priority),
        "created_at": created_at,
        "not_before": 0.0,
        "input": '{"workflow_json": {}}',
        "digest": "d",
    }
    return Job(**{**values, **fields})


def a_lease(job_id: str = "j1", token: str = "t1", worker_id: int = 7) -> Lease:
    return Lease(
        job_id=job_id,
        token=token,
        leased_at=NOW,
        expires_at=NOW + 30,
        worker_id=worker_id,
        worker_url="http://127.0.0.1:3000",
        request_idx=11,
    )
