"""Where a job is found: live ones, the last finished ones, then the journal. By key or by id, within a scope."""

from __future__ import annotations

from collections import OrderedDict

from comfyfleet.wire.workflow import Graph
from comfyfleet.worker.job import Job
from comfyfleet.worker.journal import Journal

RECENT = 256


class JobBook:
    """Memory is bounded: at most RECENT finished jobs; the journal has the others."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._live: dict[tuple[str, str], Job] = {}
        self._graphs: dict[tuple[str, str], Graph] = {}
        self._recent: OrderedDict[tuple[str, str], Job] = OrderedDict()

    def enter(self, job: Job, graph: Graph) -> None:
        self._live[job.scope, job.key] = job
        self._graphs[job.scope, job.key] = graph
        self._recent.pop((job.scope, job.key), None)

    def drop(self, job: Job) -> None:
        """A job that was not accepted after all."""
        self._live.pop((job.scope, job.key), None)
        self._graphs.pop((job.scope, job.key), None)

    def retire(self, job: Job) -> None:
        """A finished job; its graph goes, its result stays at hand for a while."""
        self.drop(job)
        job.watch, job.inputs = None, ()  # told in the result; not to be kept for each of the last jobs
        self._recent[job.scope, job.key] = job
        while len(self._recent) > RECENT:
            self._recent.popitem(last=False)

    def live(self) -> list[Job]:
        return list(self._live.values())

    def graphs(self) -> list[Graph]:
        return list(self._graphs.values())

    def graph(self, job: Job) -> Graph | None:
        return self._graphs.get((job.scope, job.key))

    def by_key(self, scope: str, key: str) -> Job | None:
        """Live or recent."""
        return self._live.get((scope, key)) or self._recent.get((scope, key))

    def find(self, scope: str, key: str) -> Job | None:
        """Live, recent or journaled."""
        return self.by_key(scope, key) or self._journal.find(scope=scope, key=key)

    def get(self, job_id: str, scope: str) -> Job | None:
        """By the public id, which is the key wherever the caller chose one."""
        found = self.by_key(scope, job_id)
        if found is not None and found.id == job_id:
            return found
        for job in (*self._live.values(), *self._recent.values()):
            if job.id == job_id and job.scope == scope:
                return job
        return self._journal.find_by_id(job_id, scope)
