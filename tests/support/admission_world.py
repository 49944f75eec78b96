"""A whole control plane without a server or loops, for what is accepted: submits come as the API's own, by its hand."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from comfyfleet.clock import Clock
from comfyfleet.control.admission import JobRequest
from comfyfleet.control.app import Control, open_control
from comfyfleet.control.auth import JOBS, Principal
from comfyfleet.control.jobs import Job, JobFilter
from comfyfleet.control.records import Endpoint, KeyLimits
from comfyfleet.control.store.base import Added
from comfyfleet.settings.control import ControlSettings
from support.fleet_world import a_graph


def a_request(number: int = 0, **fields: Any) -> JobRequest:
    return JobRequest(**{"endpoint": "comfy", "input": {"workflow_json": a_graph(number)}, **fields})


class AdmissionWorld:
    """One endpoint, `comfy`, and callers with the limits they are given. Use as `async with`."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.folder = folder
        self.clock = clock
        self.control: Control

    async def __aenter__(self) -> AdmissionWorld:
        self._stack = AsyncExitStack()
        settings = ControlSettings(data_dir=self.folder)
        self.control = await self._stack.enter_async_context(open_control(settings, clock=self.clock))
        endpoint = Endpoint(id=1, endpoint_name="comfy", created_at=0.0)
        await self.control.store.put(endpoint)
        self.control.catalog.put_endpoint(endpoint)
        return self

    async def __aexit__(self, *_problem: object) -> None:
        await self._stack.aclose()

    async def restart(self) -> None:
        """What is in the store is all that is left."""
        await self.__aexit__()
        await self.__aenter__()

    async def submit(self, *requests: JobRequest, **limits: float) -> list[Added]:
        """limits: of the caller's key."""
        caller = Principal(scope="key:1", scopes=frozenset({JOBS}), limits=KeyLimits(**limits))
        durable = self.control.durable
        added = await durable.admission.submit(caller, requests, durable.backlog.of_scope(caller.scope))
        durable.dispatcher.submitted([one.job for one in added if not one.is_repeat])
        return added

    async def stored(self) -> list[Job]:
        """Newest first."""
        return await self.control.store.jobs(JobFilter(scope=None, limit=500))
