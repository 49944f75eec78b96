"""The control plane put together: opened from settings, its routes, its loops, and the server that runs both.

Composition only. `open_control` reads what is stored and builds every part; `build` makes the Starlette app;
`serve` runs app and loops in one task group until a signal. A loop that fails ends the process loudly.
"""

from __future__ import annotations

import contextlib
import gc
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import structlog
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp

from comfyfleet.clock import Clock, SystemClock
from comfyfleet.control.account import Account, WorkerEnvironment, WorkersStorage
from comfyfleet.control.api import account, certificates, endpoints, fleet, insight, market, templates, workergroups
from comfyfleet.control.api.calling import ERROR_HANDLERS, Caller
from comfyfleet.control.api.hot_paths import HotPaths, posts
from comfyfleet.control.api.jobs import JobApi
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.certificates import CertificateAuthority
from comfyfleet.control.condition import Condition
from comfyfleet.control.durable import DurablePlane, outreach
from comfyfleet.control.fleet.base import FleetProvider
from comfyfleet.control.fleet.local import LocalFleet, LocalSettings
from comfyfleet.control.fleet.machine import this_machine
from comfyfleet.control.fleet.ray import ray_fleet
from comfyfleet.control.forwarding import App
from comfyfleet.control.fresh_links import FreshLinks
from comfyfleet.control.keys import ADMIN_PREFIX, Keyring, Vault, secret_file
from comfyfleet.control.logbook import Logbook
from comfyfleet.control.management import Management
from comfyfleet.control.metrics import Metrics
from comfyfleet.control.ownership import SOLE_OWNER
from comfyfleet.control.plane import RoutingPlane
from comfyfleet.control.record_mirror import load_records
from comfyfleet.control.sharing import Sharing, agree_on_secrets, is_shared, open_sharing
from comfyfleet.control.store.store import SqlStore, open_postgres, open_sqlite
from comfyfleet.ids import Ids, SystemIds
from comfyfleet.listening import CannotListen, QuietServer, bind, server_config
from comfyfleet.sealing import load_or_create_key
from comfyfleet.settings.control import ControlSettings
from comfyfleet.signing import UrlSigner
from comfyfleet.storage.serve import files_app
from comfyfleet.version import __version__

log = structlog.get_logger()

GRACEFUL_STOP_S = 5


@dataclass(frozen=True, kw_only=True)
class Control:
    """Every part, for the routes and the loops."""

    settings: ControlSettings
    clock: Clock
    ids: Ids
    store: SqlStore
    catalog: Catalog
    keyring: Keyring
    account: Account
    logbook: Logbook
    management: Management
    metrics: Metrics
    authority: CertificateAuthority
    routing: RoutingPlane
    durable: DurablePlane
    files: Starlette
    links: FreshLinks
    sharing: Sharing | None  # where other control planes may share the database
    admin_key: str
    admin_key_is_new: bool


@contextlib.asynccontextmanager
async def open_control(
    settings: ControlSettings, *, clock: Clock | None = None, ids: Ids | None = None
) -> AsyncIterator[Control]:
    """Read keys, records (made at first start) and what limits count, and build every part; nothing runs yet.

    Closes them at the end.
    """
    clock = clock or SystemClock()
    ids = ids or SystemIds()
    folder = settings.data_dir
    folder.mkdir(parents=True, exist_ok=True)
    is_new = not (folder / "admin.key").exists()
    master = master_key(settings)
    store = _open_store(settings)
    if is_shared(settings):
        await agree_on_secrets(settings, store, master, clock, ids)
    admin_key, _ = secret_file(folder / "admin.key", ids.token(ADMIN_PREFIX).encode())
    files_key = load_or_create_key(folder / "files.key")
    signer = UrlSigner(files_key, clock)
    catalog = Catalog()
    keyring = Keyring(admin_key=admin_key.decode(), master=master, catalog=catalog, clock=clock)
    account = Account(store=store, vault=Vault(master), clock=clock)
    await load_records(store, catalog, keyring, account)
    sharing = None
    if is_shared(settings):
        sharing = open_sharing(
            settings, store=store, catalog=catalog, keyring=keyring, account=account, clock=clock, ids=ids
        )
    ownership = sharing.replicas if sharing is not None else SOLE_OWNER
    environment = WorkerEnvironment(catalog, account)
    routing = RoutingPlane(
        data_dir=folder,
        catalog=catalog,
        keys=keyring,
        store=store,
        provider=_provider(settings, clock, ids, files_key),
        environment=environment,
        clock=clock,
        ids=ids,
        ownership=ownership,
    )
    await routing.load()
    logbook = Logbook(store, clock)
    metrics = Metrics(catalog=catalog, workers=routing.workers, store=store)
    async with outreach(settings, clock) as (session, fetcher, trusted):
        durable = DurablePlane(
            settings=settings,
            store=store,
            catalog=catalog,
            vault=account.vault,
            webhook_key=load_or_create_key(folder / "webhooks.key"),
            routing=routing,
            metrics=metrics,
            session=session,
            fetcher=fetcher,
            trusted=trusted,
            s3_of=WorkersStorage(
                catalog, environment, routing.workers, settings.inherited if settings.fleet == "local" else None
            ),
            clock=clock,
            ids=ids,
            ownership=ownership,
        )
        control = Control(
            settings=settings,
            clock=clock,
            ids=ids,
            store=store,
            catalog=catalog,
            keyring=keyring,
            account=account,
            logbook=logbook,
            management=Management(store=store, catalog=catalog, logbook=logbook, clock=clock),
            metrics=metrics,
            authority=CertificateAuthority.open(folder, clock),
            routing=routing,
            durable=durable,
            files=files_app(folder / "output", signer),
            links=FreshLinks(folder / "output", signer, clock),
            sharing=sharing,
            admin_key=admin_key.decode(),
            admin_key_is_new=is_new,
        )
        try:
            await durable.load()
            if sharing is None:
                yield control
            else:
                async with sharing.among_replicas(routing, durable):
                    yield control
        finally:
            with anyio.CancelScope(shield=True):  # what was said must be saved, whatever ended us
                # Workers on Ray are the cluster's. Others are ended, unless another replica is there.
                has_others = sharing is not None and bool(sharing.replicas.others())
                await routing.close(keep_workers=has_others or settings.fleet == "ray")
                await logbook.flush()
                await store.close()


def master_key(settings: ControlSettings) -> bytes:
    """The key that all else is sealed under: the given one, else the file's, made at first start.

    Raises ValueError where both are there and differ.
    """
    given = settings.master_key.strip().encode()
    master, _ = secret_file(settings.data_dir / "master.key", given or secrets.token_hex(32).encode())
    if given and given != master:
        raise ValueError(f"COMFYFLEET_MASTER_KEY is not what {settings.data_dir / 'master.key'} holds")
    return master


def _provider(settings: ControlSettings, clock: Clock, ids: Ids, files_key: bytes) -> FleetProvider | None:
    if settings.fleet == "ray":
        return ray_fleet(settings, clock, ids, files_key)
    if settings.fleet != "local":
        return None
    return LocalFleet(
        LocalSettings(
            data_dir=settings.data_dir,
            report_url=settings.report_url or settings.base_url,
            slots=max(1, settings.max_workers),
            machine=this_machine("127.0.0.1", max(1, settings.max_workers)),
            base_environment=settings.inherited,
            own_environment={
                "COMFYFLEET_DATA_DIR": str(settings.data_dir),
                "COMFYFLEET_FILES_URL": settings.base_url,
                "COMFYFLEET_FILES_KEY_FILE": str(settings.data_dir / "files.key"),
            },
        ),
        clock,
    )


def _open_store(settings: ControlSettings) -> SqlStore:
    if settings.database.startswith(("postgres://", "postgresql://")):
        return open_postgres(settings.database)
    path = settings.database.removeprefix("sqlite:///")
    return open_sqlite(Path(path) if path else settings.data_dir / "control.sqlite3")


def build(control: Control) -> ASGIApp:
    """The app: hot paths first; all else on FastAPI, so that `/docs` shows it."""
    caller = Caller(control.keyring)
    api = FastAPI(
        title="comfyfleet control plane",
        version=__version__,
        description="Endpoints, workergroups, durable jobs and keys. `/route/` and the workers' reports are served "
        "beside this and documented in the reference.",
        exception_handlers=ERROR_HANDLERS,
    )
    management, keyring, workers = control.management, control.keyring, control.routing.workers
    api.include_router(endpoints.router(management, keyring, workers, caller))
    api.include_router(workergroups.router(management, keyring, workers, caller))
    api.include_router(templates.router(management, caller))
    api.include_router(account.router(control.account, keyring, control.store, caller, control.clock, control.ids))
    api.include_router(certificates.router(control.authority, keyring, workers, control.store))
    api.include_router(
        insight.router(
            management=management,
            workers=workers,
            logbook=control.logbook,
            store=control.store,
            metrics=control.metrics,
            caller=caller,
            condition=partial(condition_of, control),
        )
    )
    api.include_router(fleet.router(provider=control.routing.provider, workers=workers, caller=caller))
    api.include_router(
        market.router(provider=control.routing.provider, workers=workers, catalog=control.catalog, caller=caller)
    )
    jobs = JobApi(
        plane=control.durable,
        store=control.store,
        catalog=control.catalog,
        desk=control.routing.desk,
        metrics=control.metrics,
        caller=caller,
        links=control.links,
        base_url=control.settings.public_url,
    )
    api.include_router(jobs.router())
    routes = control.routing.routes()
    app = Starlette(
        routes=[*routes, *jobs.hot_routes(), Mount("/files", app=control.files), Mount("/", app=api)],
        exception_handlers=ERROR_HANDLERS,
    )
    return HotPaths(app, {**posts(routes), ("POST", "/v1/jobs"): jobs.submit})


def condition_of(control: Control) -> Condition:
    """Whether a load balancer may send callers here."""
    shared = control.sharing.condition() if control.sharing is not None else Condition()
    if control.durable.feed.is_closed:  # connections that are kept open may still ask
        return Condition(why_unfit="it is stopping", facts=shared.facts)
    return shared


async def run_loops(control: Control) -> None:
    """Every loop, in one task group, until cancelled."""
    async with anyio.create_task_group() as group:
        group.start_soon(control.logbook.run, name="logbook")
        group.start_soon(control.routing.run, name="routing")
        group.start_soon(control.durable.run, name="durable jobs")
        if control.sharing is not None:
            group.start_soon(control.sharing.run, name="sharing")


@contextlib.asynccontextmanager
async def door(control: Control) -> AsyncIterator[App]:
    """The app as callers meet it: itself, or behind what passes requests to the replica that can answer."""
    app = build(control)
    if control.sharing is None:
        yield app
    else:
        async with control.sharing.door(app, control.store, control.catalog, control.routing) as forwarding:
            yield forwarding


def listen(settings: ControlSettings) -> socket.socket:
    """The inherited socket if there is one (its owner keeps it open across our restarts), else a new one."""
    if settings.fd is not None:
        try:
            return socket.socket(fileno=settings.fd)
        except OSError as problem:
            raise CannotListen(f"--fd {settings.fd} is no open socket: {problem.strerror}") from problem
    listener = bind(settings.host, settings.port)
    listener.listen(2048)
    return listener


async def serve(settings: ControlSettings, listener: socket.socket) -> None:
    """Run until SIGTERM or SIGINT; returns when everything is saved."""
    # The store's writer thread gives the interpreter up after this long, not 5 ms: answers wait for it.
    sys.setswitchinterval(0.0005)
    async with open_control(settings) as control, door(control) as app:
        if control.admin_key_is_new:
            log.info("admin_key.made", path=str(settings.data_dir / "admin.key"))
            if sys.stdout.isatty():  # once, and never into a file or a pipe
                path = settings.data_dir / "admin.key"
                sys.stdout.write(f"admin key (made now, kept in {path}):\n{control.admin_key}\n")
        server = QuietServer(
            server_config(
                app,
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=GRACEFUL_STOP_S,
                timeout_keep_alive=75,
                ssl_certfile=settings.tls_cert,
                ssl_keyfile=settings.tls_key,
            )
        )
        gc.freeze()  # what was built so far stays: no full collection looks at it while somebody waits
        async with anyio.create_task_group() as group:
            group.start_soon(_stop_on_signal, server, control, name="signals")
            group.start_soon(run_loops, control, name="loops")
            log.info("control.serving", url=settings.base_url, version=__version__)
            await server.serve(sockets=[listener])
            group.cancel_scope.cancel()
    log.info("control.stopped")


async def _stop_on_signal(server: QuietServer, control: Control) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            control.durable.feed.close()
            server.should_exit = True
