"""Composition root of a worker: engines and their supervisor, the job service, the wrapper, and the agent in a fleet.

Everything is built here and handed down; nothing here decides. Order at the end: the wrapper stops accepting, running
jobs are left to the journal, engines of ours are stopped.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import anyio
import anyio.to_thread
import msgspec
import structlog

from comfyfleet.clock import Clock
from comfyfleet.ids import Ids
from comfyfleet.listening import QuietServer, bind, server_config, stop_on_signal
from comfyfleet.provision.staging import free_bytes
from comfyfleet.sealing import Sealer, load_or_create_key
from comfyfleet.settings.agent import AgentSettings, agent_settings
from comfyfleet.settings.pyworker import pyworker_settings
from comfyfleet.settings.worker import WorkerSettings
from comfyfleet.wire.file_inputs import only_engine_knows
from comfyfleet.wire.generation import GenerateInput, GenerateResult, OutputEntry
from comfyfleet.wire.workflow import Graph
from comfyfleet.worker.agent.agent import Agent, AgentFolders
from comfyfleet.worker.agent.pyworker import Pyworker
from comfyfleet.worker.api.app import FilesMount, build
from comfyfleet.worker.api.files_and_hooks import routes as files_and_hooks
from comfyfleet.worker.api.generate import GenerateRoutes
from comfyfleet.worker.api.machine_metrics import MachineMetrics
from comfyfleet.worker.api.metrics import WorkerMetrics
from comfyfleet.worker.engines.client import EngineClient
from comfyfleet.worker.engines.layout import EnginePlan, plan_engines
from comfyfleet.worker.engines.learned import Durations
from comfyfleet.worker.engines.pool import EnginePool, EngineSlot
from comfyfleet.worker.engines.reach import KINDS, pull_outputs
from comfyfleet.worker.engines.supervisor import Supervisor
from comfyfleet.worker.job import Finished, Job
from comfyfleet.worker.journal import Journal
from comfyfleet.worker.machine import Machine, build_machine
from comfyfleet.worker.pipeline import Stages
from comfyfleet.worker.rendered import Rendered, RenderedJobs
from comfyfleet.worker.service import JobService
from comfyfleet.worker.stages.fetch_inputs import FetchedInputs
from comfyfleet.worker.stages.history_files import Made, expected_folders, missing_files
from comfyfleet.worker.stages.kit import Kit, KitPlaces, open_kit
from comfyfleet.worker.stages.tidy_uploads import TidyUploads
from comfyfleet.worker.templates import SHIPPED, Templates
from comfyfleet.worker.upkeep import Retention

log = structlog.get_logger()

_result_decoder = msgspec.json.Decoder(GenerateResult)


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A running worker's parts, for the agent and for tests."""

    service: JobService
    pool: EnginePool
    session: aiohttp.ClientSession
    metrics: WorkerMetrics
    kit: Kit
    machine: Machine


@asynccontextmanager
async def running(settings: WorkerSettings, env: Mapping[str, str], *, clock: Clock, ids: Ids) -> AsyncIterator[Worker]:
    """Engines starting, jobs moving; no listener yet. `env` is what engine children inherit."""
    folders = settings.folders
    folders.worker_dir.mkdir(parents=True, exist_ok=True)
    plans = plan_engines(settings.engines, folders, env)
    given = settings.storage.files_key
    key = bytes.fromhex(given) if given else load_or_create_key(folders.files_key_file)
    storage = settings.storage
    if storage.notice:
        log.warning("storage.incomplete", why=storage.notice)
    if not storage.files_url:  # nobody else serves this worker's files: it does so itself
        host = "127.0.0.1" if settings.wrapper.host in ("0.0.0.0", "::", "") else settings.wrapper.host  # noqa: S104
        storage = replace(storage, files_url=f"http://{host}:{settings.wrapper.port}")
    sealer = Sealer(load_or_create_key(folders.worker_dir / "journal.key"), "journal")
    journal = Journal(folders.worker_dir / "journal.sqlite3", sealer)
    renders = RenderedJobs(journal, sealer)
    metrics = WorkerMetrics()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=120)
    connector = aiohttp.TCPConnector(limit=0, force_close=False, keepalive_timeout=60)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
            open_kit(
                KitPlaces(
                    output=folders.output_dir,
                    engine_input=plans[0].folders["input"],
                    outbox=folders.worker_dir / "webhooks.sqlite3",
                    uploads=folders.worker_dir / "uploads.sqlite3",
                    key=key,
                ),
                storage,
                settings.webhook,
                settings.fetch,
                clock=clock,
                ids=ids,
            ) as kit,
            anyio.create_task_group() as tasks,
        ):
            slots = [_slot(plan, session, clock, ids) for plan in plans]
            pool = EnginePool(slots, clock)
            supervisor = Supervisor(pool, clock=clock, ids=ids)

            def finished(job: Job, seconds: float) -> None:
                metrics.finished(job, seconds)
                kit.drafts.renew()

            templates = [folder for folder in (folders.templates_dir, SHIPPED) if folder is not None]
            service = JobService(
                pool=pool,
                stages=_stages(kit, pool, renders, settings.webhook.url, folders.worker_dir / "pulled"),
                journal=journal,
                templates=Templates(*templates),
                settings=settings.queue,
                durations=Durations(),
                clock=clock,
                ids=ids,
                on_finished=finished,
            )
            metrics.watch(service)
            if storage.notice:
                service.facts["storage"] = {"notice": storage.notice}
            machine = build_machine(
                settings,
                env,
                service=service,
                slots=slots,
                kit=kit,
                kept_folders=journal.kept_folders,
                clock=clock,
                ids=ids,
            )
            retention = Retention(
                journal,
                kit.local,
                result_ttl_s=settings.queue.result_ttl_s,
                live_folders=service.live_folders,
                clock=clock,
                ids=ids,
            )
            MachineMetrics(
                metrics.registry,
                startup=machine.startup,
                cards=lambda: machine.cards.facts,
                free_bytes=lambda: free_bytes(folders.output_dir),
            )

            async def tend(slot: EngineSlot, plan: EnginePlan) -> None:
                await machine.provisioning.done.wait()
                await supervisor.tend(slot, plan.launch)

            tasks.start_soon(machine.run, name="machine")
            tasks.start_soon(retention.run, name="retention")
            tidy = TidyUploads(kit.long_uploads, journal.is_open, clock, ids)
            tasks.start_soon(tidy.run, name="tidy uploads")
            for slot, plan in zip(slots, plans, strict=True):
                tasks.start_soon(tend, slot, plan, name=slot.name)
            await tasks.start(service.run, name="jobs")
            yield Worker(service=service, pool=pool, session=session, metrics=metrics, kit=kit, machine=machine)
            service.drain()
            tasks.cancel_scope.cancel()
    finally:
        await journal.close()


async def serve(settings: WorkerSettings, env: Mapping[str, str], *, clock: Clock, ids: Ids) -> None:
    """Run the worker until SIGTERM or SIGINT."""
    listener = bind(settings.wrapper.host, settings.wrapper.port)
    async with running(settings, env, clock=clock, ids=ids) as worker:
        app = build(
            worker.service,
            clock=clock,
            metrics=worker.metrics,
            key=settings.wrapper.key,
            max_body_bytes=settings.wrapper.max_body_bytes,
            include_response=settings.wrapper.include_comfyui_response,
            files=FilesMount(root=settings.folders.output_dir, signer=worker.kit.signer),
            beside=files_and_hooks(worker.kit, upload_max_bytes=settings.fetch.input_max_bytes),
        )
        server = QuietServer(server_config(app, proxy_headers=False, timeout_graceful_shutdown=2))
        # What was loaded stays: collecting it again and again costs a waiting caller tens of milliseconds each time.
        gc.collect()
        gc.freeze()
        log.info("worker.listening", host=settings.wrapper.host, port=listener.getsockname()[1])
        fleet = agent_settings(env)

        def end_this_life() -> None:
            log.error("worker.fenced", why="this worker was started again elsewhere; this process ends")
            server.should_exit = True

        async with anyio.create_task_group() as members:
            members.start_soon(stop_on_signal, server, name="signals")
            foreign = pyworker_settings(env)
            if fleet is not None and foreign is not None:
                pyworker = Pyworker(
                    settings=foreign,
                    fleet=fleet,
                    machine=worker.machine,
                    folder=settings.folders.worker_dir,
                    env=env,
                    on_fenced=end_this_life,
                    clock=clock,
                )
                members.start_soon(pyworker.run, name="pyworker")
            elif fleet is not None:
                members.start_soon(_agent(fleet, settings, worker, end_this_life, clock, ids).run, name="agent")
            await server.serve(sockets=[listener])
            members.cancel_scope.cancel()


def _agent(
    fleet: AgentSettings,
    settings: WorkerSettings,
    worker: Worker,
    on_fenced: Callable[[], None],
    clock: Clock,
    ids: Ids,
) -> Agent:
    wrapper = settings.wrapper
    return Agent(
        fleet,
        service=worker.service,
        routes=GenerateRoutes(
            worker.service,
            clock,
            max_body_bytes=wrapper.max_body_bytes,
            include_response=wrapper.include_comfyui_response,
        ),
        fetcher=worker.kit.fetcher,
        folders=AgentFolders(worker_dir=settings.folders.worker_dir, output_dir=settings.folders.output_dir),
        machine=worker.machine,
        max_body_bytes=wrapper.max_body_bytes,
        on_fenced=on_fenced,
        clock=clock,
        ids=ids,
    )


def _slot(plan: EnginePlan, session: aiohttp.ClientSession, clock: Clock, ids: Ids) -> EngineSlot:
    client = EngineClient(plan.base_url, session=session, clock=clock, ids=ids)
    return EngineSlot(name=plan.name, client=client, owned=plan.launch is not None, folders=plan.folders, gpu=plan.gpu)


def _stages(kit: Kit, pool: EnginePool, renders: RenderedJobs, operator_webhook: str, pulled: Path) -> Stages:
    async def fetch_inputs(graph: Graph, request: GenerateInput) -> FetchedInputs:
        # A prompt may hold a link too; then this waits, once, for the first engine to say what its nodes are.
        if only_engine_knows(graph):
            await pool.until_told()
        return await kit.fetch_inputs.run(graph, request, uploads=pool.uploads())

    async def bring_outputs(slot: EngineSlot, made: Made, prompt_id: str) -> tuple[Mapping[str, Path], set[str]]:
        if not slot.is_remote:
            return slot.folders, {named.node_id for named in missing_files(made.files, slot.folders)}
        folder = pulled / prompt_id
        missing = await pull_outputs(slot.client, made.files, folder)
        return {kind: folder / kind for kind in KINDS}, missing

    def expect_outputs(folder: str, graph: Graph) -> None:
        # In the event loop's next turn: where a render is over at once, this one has its history to ask for.
        asyncio.get_running_loop().call_soon(make_folders, folder, graph)

    def make_folders(folder: str, graph: Graph) -> None:
        with suppress(OSError):  # storing makes them too, and tells
            place = kit.local.place_of(folder)
            kit.drafts.make_folders(place)
            for below in expected_folders(graph):
                kit.drafts.make_folders(f"{place}/{below}")

    async def keep_render(job: Job, rendered: Rendered) -> None:
        if kit.store_outputs.is_long_way(rendered.made, request=job.request, folders=rendered.folders):
            try:
                await renders.keep(job, rendered)
            except (sqlite3.Error, OSError):  # a full disk, most likely: then a restart renders again
                log.exception("render.not_kept", job=job.id)

    def kept_render(job: Job) -> Rendered | None:
        found = renders.find(job)
        if found is None or missing_files(found.made.files, found.folders):
            return None
        return found

    async def store_outputs(job: Job, rendered: Rendered) -> list[OutputEntry]:
        made, folders = rendered.made, rendered.folders
        try:
            return await kit.store_outputs.run(made, request_id=job.folder, request=job.request, folders=folders)
        finally:
            place = os.path.dirname(folders["output"])
            if os.path.dirname(place) == str(pulled):  # downloaded for this job alone
                await anyio.to_thread.run_sync(shutil.rmtree, place, True)

    async def resign(outputs: list[OutputEntry], request: GenerateInput) -> None:
        await kit.store_outputs.resign(outputs, request=request)

    async def notify(job: Job, finished: Finished) -> None:
        target = job.request.webhook
        if target.url or operator_webhook:
            result = _result_decoder.decode(finished.body)
            with anyio.CancelScope(shield=True):  # a job that ended is told of, also while the worker stops
                await kit.notify.finished(result, target, scope=job.scope, occurrence=f"{job.accepted_at:.6f}")

    async def follow(job: Job) -> None:
        try:
            await kit.notify.follow(job.events.follow(), job.id, job.request.webhook, scope=job.scope)
        except Exception:  # the stage boundary: news that cannot be told must not end the job
            log.exception("webhook.progress_not_told", job=job.id)

    return Stages(
        fetch_inputs=fetch_inputs,
        expect_outputs=expect_outputs,
        keep_render=keep_render,
        kept_render=kept_render,
        store_outputs=store_outputs,
        bring_outputs=bring_outputs,
        check=kit.check,
        resign=resign,
        notify=notify,
        follow=follow,
    )
