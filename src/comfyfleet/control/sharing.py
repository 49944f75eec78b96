"""What a control plane has more where several share a database: its place among them, and a door that forwards.

Composition only. A lone control plane (SQLite) has none of it. Opened before anything is served; `door` is put in
front of the app.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio

from comfyfleet.clock import Clock
from comfyfleet.control.account import Account
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.certificates import CertificateAuthority
from comfyfleet.control.condition import Condition
from comfyfleet.control.durable import DurablePlane
from comfyfleet.control.forwarding import App, Forwarding, forwarding_session
from comfyfleet.control.keys import ADMIN_PREFIX, Keyring, Vault, secret_file
from comfyfleet.control.plane import RoutingPlane
from comfyfleet.control.record_mirror import RecordMirror
from comfyfleet.control.replicas import Replicas
from comfyfleet.control.shared_secrets import share_secrets
from comfyfleet.control.store.base import Store
from comfyfleet.control.tickets import Tickets
from comfyfleet.control.whose import Whose
from comfyfleet.ids import Ids
from comfyfleet.sealing import load_or_create_key
from comfyfleet.settings.control import ControlSettings


class SharedTerritory:
    """Implements `replicas.Territory` over the two planes, which are built after it."""

    def __init__(self) -> None:
        self.routing: RoutingPlane | None = None
        self.durable: DurablePlane | None = None

    async def load(self, endpoint_ids: Collection[int]) -> None:
        assert self.routing is not None  # noqa: S101 - set before the first lease
        await self.routing.load_endpoints(endpoint_ids)

    def begin(self, endpoint_id: int) -> None:
        assert self.routing is not None and self.durable is not None  # noqa: S101, PT018 - set before the first lease
        self.routing.begin(endpoint_id)
        self.durable.begin(endpoint_id)

    def drop(self, endpoint_id: int) -> None:
        """Runs first: while they live they look at the workers that are forgotten next."""
        if self.durable is not None:
            self.durable.drop(endpoint_id)
        if self.routing is not None:
            self.routing.drop(endpoint_id)


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """`replicas` is this control plane's ownership."""

    settings: ControlSettings
    territory: SharedTerritory
    mirror: RecordMirror
    replicas: Replicas
    clock: Clock
    ids: Ids

    @asynccontextmanager
    async def among_replicas(self, routing: RoutingPlane, durable: DurablePlane) -> AsyncIterator[None]:
        """On the roll from here to the end. Raises FleetClash."""
        self.territory.routing, self.territory.durable = routing, durable
        await self.replicas.enrol()
        try:
            await self.replicas.step()
            yield
        finally:
            with anyio.CancelScope(shield=True):
                await self.replicas.leave()

    @asynccontextmanager
    async def door(self, app: App, store: Store, catalog: Catalog, routing: RoutingPlane) -> AsyncIterator[App]:
        """The app as callers meet it."""
        async with forwarding_session(self._trusted()) as session:
            yield Forwarding(
                app,
                replicas=self.replicas,
                whose=Whose(catalog=catalog, workers=routing.workers, store=store, ids=self.ids),
                mirror=self.mirror,
                session=session,
                clock=self.clock,
            )

    async def run(self) -> None:
        """The loops, until cancelled."""
        async with anyio.create_task_group() as loops:
            loops.start_soon(self.replicas.run, name="replicas")
            loops.start_soon(self.mirror.run, name="records")

    def condition(self) -> Condition:
        """For `/health`."""
        replicas = self.replicas
        facts = {
            "replica": {
                "id": replicas.id,
                "url": replicas.url,
                "endpoints": len(replicas.owned()),
                "replicas": len(replicas.roll.replicas),
            },
            "database": "away" if replicas.is_database_away else "ok",
        }
        return Condition(why_unfit=replicas.why_unfit(), facts=facts)

    def _trusted(self) -> ssl.SSLContext | None:
        """Our own authority beside the public ones, for replicas that serve TLS with a certificate of it."""
        if self.settings.tls_cert is None:
            return None
        context = ssl.create_default_context()
        context.load_verify_locations(self.settings.data_dir / "ca.pem")
        return context


def is_shared(settings: ControlSettings) -> bool:
    """Whether another control plane may work on the same database."""
    return settings.database.startswith(("postgres://", "postgresql://"))


async def agree_on_secrets(settings: ControlSettings, store: Store, master: bytes, clock: Clock, ids: Ids) -> None:
    """Before any key is used: this replica's key files are the database's. Raises OtherMasterKey."""
    folder = settings.data_dir
    secret_file(folder / "admin.key", ids.token(ADMIN_PREFIX).encode())
    load_or_create_key(folder / "files.key")
    load_or_create_key(folder / "webhooks.key")
    Tickets.open(folder)
    CertificateAuthority.open(folder, clock)
    await share_secrets(store, Vault(master), folder)


def open_sharing(
    settings: ControlSettings,
    *,
    store: Store,
    catalog: Catalog,
    keyring: Keyring,
    account: Account,
    clock: Clock,
    ids: Ids,
) -> Sharing:
    """Built before the planes, which ask `replicas` what is theirs."""
    mirror = RecordMirror(store=store, catalog=catalog, keyring=keyring, account=account, clock=clock)
    territory = SharedTerritory()
    replicas = Replicas(
        store=store,
        catalog=catalog,
        url=settings.advertised_url,
        fleet=f"local {socket.gethostname()} {settings.data_dir}" if settings.fleet == "local" else settings.fleet,
        territory=territory,
        records_changed=mirror.told,
        clock=clock,
        ids=ids,
    )
    return Sharing(settings=settings, territory=territory, mirror=mirror, replicas=replicas, clock=clock, ids=ids)
