"""The durable jobs' half of the store: every method one transaction over `sql`. See `base` for the contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from comfyfleet.control.jobs import Job, JobEvent, JobFilter, JobHead, Lease, Waiting
from comfyfleet.control.ownership import Fence
from comfyfleet.control.store import batches, sql
from comfyfleet.control.store.base import Added
from comfyfleet.control.store.batches import Ending, NewEvent, job_of
from comfyfleet.control.store.connection import Connection, Row
from comfyfleet.control.store.news import News
from comfyfleet.control.store.ownership_table import check_fence
from comfyfleet.control.store.writer import Database
from comfyfleet.wire.jobs import JobStatus

_FOREVER = 1e18


def _json(**values: Any) -> str:
    return msgspec.json.encode(values).decode()


class JobTable:
    """Durable jobs over a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add_jobs(self, jobs: Sequence[Job]) -> list[Added]:
        return await self._database.write_batched(
            batches.add_jobs, jobs, news=News(endpoints=tuple({job.endpoint_id for job in jobs}))
        )

    async def known(self, scope: str, keys: Sequence[str]) -> dict[str, Job]:
        asked = [(sql.JOB_BY_KEY, {"scope": scope, "idempotency_key": key}) for key in keys]
        rows = await self._database.read(lambda connection: connection.all_rows(asked), quick=len(asked) == 1)
        return {job.idempotency_key or "": job for job in map(job_of, rows)}

    async def job(self, job_id: str) -> Job | None:
        rows = await self._database.read(lambda connection: connection.rows(sql.JOB_BY_ID, {"id": job_id}), quick=True)
        return job_of(rows[0]) if rows else None

    async def jobs(self, wanted: JobFilter) -> list[Job]:
        before_at, before_id = wanted.before or (_FOREVER, "")
        params = {
            "any_scope": int(wanted.scope is None),
            "scope": wanted.scope or "",
            "any_endpoint": int(wanted.endpoint_id is None),
            "endpoint_id": wanted.endpoint_id or 0,
            "any_status": int(wanted.status is None),
            "status": wanted.status or "",
            "before_at": before_at,
            "before_id": before_id,
            "limit": wanted.limit,
        }
        return [
            job_of(row) for row in await self._database.read(lambda connection: connection.rows(sql.LIST_JOBS, params))
        ]

    async def waiting(self) -> list[Waiting]:
        rows = await self._database.read(lambda connection: connection.rows(sql.WAITING, {}))
        return [
            Waiting(endpoint_id=endpoint_id, scope=scope, jobs=count, cost=cost, oldest_at=oldest)
            for endpoint_id, scope, count, cost, oldest in rows
        ]

    async def position(self, job: Job) -> int:
        params = {"endpoint_id": job.endpoint_id, "scope": job.scope, "rank": job.rank, "id": job.id}
        rows = await self._database.read(lambda connection: connection.rows(sql.POSITION, params))
        return int(rows[0][0])

    async def head(self, endpoint_id: int, scope: str, now: float) -> JobHead | None:
        params = {"endpoint_id": endpoint_id, "scope": scope, "now": now}
        rows = await self._database.read(lambda connection: connection.rows(sql.HEAD, params), quick=True)
        return JobHead(**dict(zip(sql.HEAD_COLUMNS, rows[0], strict=True))) if rows else None

    async def lease(self, lease: Lease, *, fence: Fence | None = None) -> Job | None:
        def work(connection: Connection) -> Job | None:
            check_fence(connection, fence)
            rows = connection.rows(sql.LEASE, msgspec.structs.asdict(lease))
            if not rows:
                return None
            data = _json(worker_id=lease.worker_id, attempt=job_of(rows[0]).attempts)
            event = NewEvent(job_id=lease.job_id, at=lease.leased_at, kind="leased", data=data)
            batches.add_events(connection, [event])
            return job_of(rows[0])

        return await self._database.write(work, news=News(jobs=(lease.job_id,)))

    async def leased(self) -> list[Job]:
        return [job_of(row) for row in await self._database.read(lambda connection: connection.rows(sql.LEASED, {}))]

    async def take_over(
        self, job_id: str, *, old_token: str, token: str, expires_at: float, fence: Fence | None = None
    ) -> bool:
        params = {"id": job_id, "old_token": old_token, "token": token, "expires_at": expires_at}

        def work(connection: Connection) -> bool:
            check_fence(connection, fence)
            return connection.change(sql.TAKE_OVER, params) == 1

        return await self._database.write(work)

    async def renew(self, job_id: str, *, token: str, expires_at: float) -> bool:
        renewal = batches.Renewal(id=job_id, token=token, expires_at=expires_at)
        return await self._database.write_batched(batches.renew, renewal)

    async def start(self, job_id: str, *, token: str, now: float) -> bool:
        return await self._database.write_batched(
            batches.start, batches.Start(id=job_id, token=token, now=now), news=News(jobs=(job_id,))
        )

    async def finish(
        self, job_id: str, *, token: str, status: JobStatus, result: str | None, error: str | None, now: float
    ) -> bool:
        ending = Ending(id=job_id, token=token, status=status, result=result, error=error, now=now)
        return await self._database.write_batched(batches.finish, ending, news=News(jobs=(job_id,)))

    async def requeue(
        self, job_id: str, *, token: str, lost_worker: int | None, not_before: float, reason: str, now: float
    ) -> JobStatus | None:
        def work(connection: Connection) -> JobStatus | None:
            rows = connection.rows(sql.LOST_WORKERS, {"id": job_id, "token": token})
            if not rows:
                return None
            lost: list[int] = msgspec.json.decode(rows[0][0], type=list[int])
            if lost_worker is not None:
                lost.append(lost_worker)  # once for each loss
            params = {
                "id": job_id,
                "token": token,
                "lost_workers": msgspec.json.encode(lost).decode(),
                "not_before": not_before,
            }
            if not connection.change(sql.REQUEUE, params):
                status = JobStatus.CANCELLED
                ending = Ending(id=job_id, token=token, status=status, result=None, error=None, now=now)
                return status if all(batches.finish(connection, [ending])) else None
            told = _json(reason=reason, lost_workers=sorted(set(lost)))
            batches.add_events(connection, [NewEvent(job_id=job_id, at=now, kind="requeued", data=told)])
            return JobStatus.QUEUED

        return await self._database.write(work, news=News(jobs=(job_id,)))

    async def cancel(self, job_id: str, now: float) -> Job | None:
        ending = Ending(id=job_id, token=None, status=JobStatus.CANCELLED, result=None, error=None, now=now)

        def work(connection: Connection) -> Job | None:
            if not all(batches.end_waiting(connection, [ending])):
                connection.change(sql.ASK_CANCEL, {"id": job_id})
            rows = connection.rows(sql.JOB_BY_ID, {"id": job_id})
            return job_of(rows[0]) if rows else None

        return await self._database.write(work, news=News(jobs=(job_id,), cancels=(job_id,)))

    async def fail_waiting(self, job_id: str, *, error: str, now: float) -> bool:
        ending = Ending(id=job_id, token=None, status=JobStatus.FAILED, result=None, error=error, now=now)
        return await self._database.write_batched(batches.end_waiting, ending, news=News(jobs=(job_id,)))

    async def overdue(self, now: float) -> list[str]:
        rows = await self._database.read(lambda connection: connection.rows(sql.OVERDUE, {"now": now}))
        return [row[0] for row in rows]

    async def add_event(self, job_id: str, *, kind: str, data: str, now: float) -> JobEvent:
        event = NewEvent(job_id=job_id, at=now, kind=kind, data=data)
        return await self._database.write_batched(batches.add_events, event, news=News(jobs=(job_id,)))

    async def events(self, job_id: str, after: int = 0) -> list[JobEvent]:
        def work(connection: Connection) -> tuple[list[Row], list[Row]]:
            job = connection.rows(sql.JOB_BY_ID, {"id": job_id}) if after < 1 else []
            return job, connection.rows(sql.EVENTS, {"job_id": job_id, "after": after})

        job, rows = await self._database.read(work, quick=True)
        first = [JobEvent(job_id=job_id, seq=1, at=job_of(row).created_at, kind="queued", data="{}") for row in job]
        return first + [JobEvent(job_id=of, seq=seq, at=at, kind=kind, data=data) for of, seq, at, kind, data in rows]

    async def undelivered(self) -> list[str]:
        rows = await self._database.read(lambda connection: connection.rows(sql.UNDELIVERED, {}))
        return [row[0] for row in rows]

    async def webhook_out(self, job_id: str, *, fence: Fence | None = None) -> None:
        def work(connection: Connection) -> None:
            check_fence(connection, fence)
            connection.change(sql.WEBHOOK_OUT, {"id": job_id})

        await self._database.write(work)

    async def webhook_ended(self, job_id: str) -> None:
        await self._database.write(lambda connection: connection.change(sql.WEBHOOK_ENDED, {"id": job_id}))

    async def webhooks_due_again(self, endpoint_id: int, *, fence: Fence | None = None) -> None:
        def work(connection: Connection) -> None:
            check_fence(connection, fence)
            connection.change(sql.WEBHOOKS_DUE_AGAIN, {"endpoint_id": endpoint_id})

        await self._database.write(work)

    async def has_untold(self, endpoint_id: int) -> bool:
        params = {"endpoint_id": endpoint_id}
        return bool(await self._database.read(lambda connection: connection.rows(sql.UNTOLD, params)))

    async def prune(self, finished_before: float) -> int:
        def work(connection: Connection) -> int:
            connection.take_time()
            connection.change(sql.PRUNE_EVENTS, {"before": finished_before})
            return connection.change(sql.PRUNE_JOBS, {"before": finished_before})

        return await self._database.write(work)
