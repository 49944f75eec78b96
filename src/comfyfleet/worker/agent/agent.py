"""The agent's way: get the key, wait for the engine, measure the score, report, serve. And the loops that keep at it.

Whatever stops it on the way is reported as the worker's own reason (`startup.error`) and tried again where trying can
help; the process stays up, so that a user can read why.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import anyio
import anyio.abc
import anyio.to_thread
import msgspec
import structlog

from comfyfleet.clock import Clock
from comfyfleet.fetching.fetcher import GuardedFetcher
from comfyfleet.gpu import gpu_name
from comfyfleet.ids import Ids
from comfyfleet.listening import CannotListen, bind, serve
from comfyfleet.provision.template import find_template
from comfyfleet.settings.agent import AgentSettings
from comfyfleet.version import __version__
from comfyfleet.wire.errors import FleetError
from comfyfleet.wire.generation import GenerateInput
from comfyfleet.wire.shapes import shape_of
from comfyfleet.wire.workers import WorkerStatusReport
from comfyfleet.wire.workflow import Graph, read_graph
from comfyfleet.worker.agent.benchmark import BenchmarkFailed, BenchmarkKey, ScoreCache, graph_digest, with_random_seeds
from comfyfleet.worker.agent.drift import DriftWatch
from comfyfleet.worker.agent.lease import Lease
from comfyfleet.worker.agent.load_book import LoadBook, LoadSums
from comfyfleet.worker.agent.measuring import Measured, measure
from comfyfleet.worker.agent.reporter import Reporter, ReportTarget
from comfyfleet.worker.agent.server import TicketedServer
from comfyfleet.worker.agent.session_routes import SessionRoutes
from comfyfleet.worker.agent.sessions import Sessions
from comfyfleet.worker.agent.startup import Stage
from comfyfleet.worker.agent.tickets import TicketChecker
from comfyfleet.worker.api.generate import GenerateRoutes
from comfyfleet.worker.job import Job
from comfyfleet.worker.machine import Machine
from comfyfleet.worker.service import JobService

log = structlog.get_logger()

KEY_RETRY_S = 2.0
ENGINE_POLL_S = 0.1
BENCHMARK_RETRY_S = 30.0
BENCHMARK_SCOPE = "comfyfleet-benchmark"


@dataclass(frozen=True, kw_only=True)
class AgentFolders:
    """worker_dir: this worker's own; output_dir: where jobs' outputs go, the benchmark's included until it is over."""

    worker_dir: Path
    output_dir: Path


class Agent:
    """Build it with the worker's parts, then keep `run` running beside the service."""

    def __init__(
        self,
        settings: AgentSettings,
        *,
        service: JobService,
        routes: GenerateRoutes,
        fetcher: GuardedFetcher,
        folders: AgentFolders,
        machine: Machine,
        max_body_bytes: int,
        on_fenced: Callable[[], None],
        clock: Clock,
        ids: Ids,
    ) -> None:
        self._settings = settings
        self._on_fenced = on_fenced
        self._service = service
        self._folders = folders
        self._machine = machine
        self._gpu_name = "cpu"
        self._clock = clock
        self.startup = machine.startup
        self._book = LoadBook()
        self._lease = Lease(clock)
        self._measured: Measured | None = None
        self._drift: DriftWatch | None = None
        self._scores = ScoreCache(folders.worker_dir / "scores.json")
        self._reporter: Reporter | None = None
        sessions = SessionRoutes(
            table=Sessions(limit=settings.max_sessions, ids=ids), book=self._book, clock=clock, fetcher=fetcher
        )
        self._server = TicketedServer(
            service=service,
            routes=routes,
            sessions=sessions,
            book=self._book,
            startup=self.startup,
            clock=clock,
            on_change=self._changed,
            on_success=self._completed,
            output_dir=folders.output_dir,
            max_body_bytes=max_body_bytes,
        )

    async def run(self) -> None:
        """Until cancelled."""
        async with aiohttp.ClientSession() as session, anyio.create_task_group() as loops:
            self._reporter = Reporter(
                ReportTarget(
                    report_urls=self._settings.report_urls,
                    worker_id=self._settings.worker_id,
                    mtoken=self._settings.mtoken,
                    incarnation=self._settings.incarnation,
                ),
                book=self._book,
                describe=self._describe,
                on_fenced=self._on_fenced,
                lease=self._lease,
                session=session,
                clock=self._clock,
            )
            loops.start_soon(self._reporter.run, name="reporter")
            loops.start_soon(self._server.run, name="followers")
            loops.start_soon(serve, self._server, bind(self._settings.host, self._settings.port), name="public port")
            loops.start_soon(self._serve_side_port, name="side port")
            loops.start_soon(self._start_up, session, name="start-up")

    async def _serve_side_port(self) -> None:
        """A worker without it serves all the same: only a local webhook could miss it."""
        try:
            listener = bind("127.0.0.1", self._settings.side_port)
        except CannotListen as error:
            log.warning("side_port.taken", why=error.message)
            return
        await serve(self._server.side, listener)

    async def _start_up(self, session: aiohttp.ClientSession) -> None:
        await self._admit_tickets(session)
        await self._machine.provisioning.done.wait()
        self._gpu_name = await anyio.to_thread.run_sync(gpu_name)
        self.startup.enter(Stage.ENGINE_START)
        self._changed()
        while not self._service.is_ready:
            await self._clock.sleep(ENGINE_POLL_S)
        self.startup.enter(Stage.ENGINE_READY)
        self._changed()
        self._measured = await self._score()
        self.startup.enter(Stage.REGISTERED)
        self.startup.enter(Stage.READY)
        self._changed()
        log.info("worker.ready", score=round(self._measured.score.score, 3), seconds=self.startup.seconds)

    async def _admit_tickets(self, session: aiohttp.ClientSession) -> None:
        """Fetch the public key; a control plane that is away is waited for, as long as it takes."""
        while True:
            for base in self._settings.report_urls:
                try:
                    async with session.get(f"{base}/pubkey/ed25519", timeout=aiohttp.ClientTimeout(total=10)) as answer:
                        if answer.status == 200:
                            self._server.admit(
                                TicketChecker(
                                    public_key_pem=await answer.read(),
                                    url=self._settings.url,
                                    endpoint=self._settings.endpoint,
                                    incarnation=self._settings.incarnation,
                                    lease=self._lease,
                                    clock=self._clock,
                                )
                            )
                            return
                        why = f"HTTP {answer.status}"
                except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                    why = str(error) or type(error).__name__
                log.warning("ticket_key.unavailable", control_plane=base, why=why)
            await self._clock.sleep(KEY_RETRY_S)

    async def _score(self) -> Measured:
        """The benchmark, again and again until it succeeds; each failure is shown with its cause."""
        self.startup.enter(Stage.BENCHMARK)
        while True:
            try:
                graph = self._benchmark_graph()
                key = BenchmarkKey(
                    graph_digest=graph_digest(graph),
                    gpu_name=self._gpu_name,
                    engine_version=self._service.engine_version(),
                    template=self._settings.template,
                    engines=len(self._service.engines),
                )
                measured = await measure(
                    with_random_seeds(graph),
                    key,
                    run_round=self._run_round,
                    engines=len(self._service.engines),
                    cache=self._scores,
                    clock=self._clock,
                    limit_s=self._benchmark_limit_s(),
                    on_round=self._on_round,
                )
                self._drift = DriftWatch(shape=shape_of(graph), median_s=measured.score.median_s)
                return measured
            except (BenchmarkFailed, FleetError, OSError, ValueError) as error:
                self.startup.fail(str(error))
                log.error("benchmark.failed", why=str(error))
                self._changed()
                await self._clock.sleep(BENCHMARK_RETRY_S)

    def _benchmark_graph(self) -> Graph:
        """`BENCHMARK_JSON_PATH` before the template's own."""
        path = self._settings.benchmark_json
        if path is not None:
            if not path.is_file():
                raise BenchmarkFailed(cause=f"BENCHMARK_JSON_PATH names no file: {path.name}")
            return read_graph(path.read_bytes(), field=path.name)
        graph = find_template(self._settings.template).benchmark_graph()
        if graph is None:
            raise BenchmarkFailed(
                cause=f"template {self._settings.template} has no benchmark: set BENCHMARK_JSON_PATH to a graph"
            )
        return graph

    def _benchmark_limit_s(self) -> float:
        given = self._settings.benchmark_limit_s
        return given if given is not None else find_template(self._settings.template).benchmark_limit_s

    async def _run_round(self, graph: Graph) -> None:
        job = await self._service.submit(GenerateInput(workflow_json=graph, force=True), scope=BENCHMARK_SCOPE)
        finished = await self._service.wait(job)
        shutil.rmtree(self._folders.output_dir / job.folder, ignore_errors=True)
        if finished.http_status != 200:
            raise BenchmarkFailed(cause=str(msgspec.json.decode(finished.body).get("message", finished.http_status)))

    def _completed(self, job: Job) -> None:
        """A caller's job succeeded: does it still bear out the score? The first doubt outdates the cached one."""
        if self._drift is None or self._measured is None:
            return
        before = self._drift.flag
        self._drift.ran(job.shape, job.engine_s)
        if self._drift.flag and not before:
            log.warning("benchmark.drifted", why=self._drift.flag)
            self._distrust(self._measured.score.key)

    def _distrust(self, key: BenchmarkKey) -> None:
        try:
            self._scores.distrust(key)
        except OSError as error:
            log.warning("benchmark.not_outdated", why=error.strerror)

    def _on_round(self, detail: str) -> None:
        self.startup.enter(Stage.BENCHMARK, detail)
        self._changed()

    def _changed(self) -> None:
        if self._reporter is not None:
            self._reporter.wake()

    def _describe(self, sums: LoadSums) -> WorkerStatusReport:
        """The worker as the control plane is to see it. Disk figures in GB, as the protocol has them."""
        measured, startup = self._measured, self.startup
        is_ready = startup.stage is Stage.READY and measured is not None
        return WorkerStatusReport(
            id=self._settings.worker_id,
            mtoken=self._settings.mtoken,
            version=f"comfyfleet-{__version__}",
            url=self._settings.url,
            loadtime=round(startup.loadtime_s, 3) if is_ready else 0.0,
            cur_load=self._book.current_load,
            new_load=sums.new_load,
            rej_load=sums.rej_load,
            cur_perf=sums.cur_perf,
            max_perf=measured.score.score if is_ready and measured else 0.0,
            error_msg=startup.error or self._service.trouble(),
            num_requests_working=self._book.working,
            num_requests_recieved=self._book.received,
            disk_usage=round(shutil.disk_usage(self._folders.worker_dir).used / 1e9, 1),
            working_request_idxs=self._book.working_request_idxs(),
            incarnation=self._settings.incarnation,
            stage=startup.stage.value,
            stage_detail=startup.detail,
            stage_seconds=dict(startup.seconds),
            gpu_name=self._gpu_name,
            warm_models=self._service.warm_models(),
            gpu={"cards": [msgspec.to_builtins(card) for card in self._machine.cards.facts]},
            engine_version=self._service.engine_version(),
            is_flagged=(measured.flag if measured else "") or (self._drift.flag if self._drift else ""),
        )
