"""All of a worker's dealings with the outside, built from settings and closed together.

`open_kit` is for a composition root: inside it the stages are ready and the webhook loop runs. It builds; it decides
nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import anyio

from comfyfleet.clock import Clock
from comfyfleet.fetching.addresses import AddressRules
from comfyfleet.fetching.fetcher import GuardedFetcher
from comfyfleet.fetching.tunnel import guarded_tunnel
from comfyfleet.ids import Ids
from comfyfleet.sealing import Sealer
from comfyfleet.settings.outreach import FetchSettings, WebhookSettings
from comfyfleet.settings.storage import StorageSettings
from comfyfleet.signing import UrlSigner
from comfyfleet.storage.drafts import Drafts
from comfyfleet.storage.local import LocalStorage
from comfyfleet.storage.long_uploads import LongUploads, long_uploads
from comfyfleet.storage.s3 import S3Storages
from comfyfleet.storage.upload_book import UploadBook
from comfyfleet.webhooks.deliver import Webhooks
from comfyfleet.webhooks.outbox import Outbox
from comfyfleet.wire.generation import GenerateInput
from comfyfleet.worker.stages.destinations import Destinations
from comfyfleet.worker.stages.fetch_inputs import FetchInputs
from comfyfleet.worker.stages.input_store import InputStore
from comfyfleet.worker.stages.notify import Notify
from comfyfleet.worker.stages.store_outputs import StoreOutputs


@dataclass(frozen=True, kw_only=True)
class KitPlaces:
    """Folders: results (`<data>/output`), the engine's input folder; files: webhooks, uploads; the file-link key."""

    output: Path
    engine_input: Path
    outbox: Path
    uploads: Path
    key: bytes


@dataclass(frozen=True, kw_only=True)
class Kit:
    """The stages, and what they share."""

    fetch_inputs: FetchInputs
    store_outputs: StoreOutputs
    notify: Notify
    inputs: InputStore
    destinations: Destinations
    signer: UrlSigner
    local: LocalStorage
    drafts: Drafts
    fetcher: GuardedFetcher
    long_uploads: LongUploads

    def check(self, request: GenerateInput) -> None:
        """Refuse what can never work, before the job is accepted. Raises a FleetError naming the field."""
        self.destinations.check(request.s3)
        self.notify.check(request.webhook)


@asynccontextmanager
async def open_kit(
    places: KitPlaces,
    storage: StorageSettings,
    webhook: WebhookSettings,
    fetch: FetchSettings,
    *,
    clock: Clock,
    ids: Ids,
) -> AsyncIterator[Kit]:
    """The stages, with the fetcher open and webhooks being delivered, until the block ends."""
    rules = AddressRules.parse(fetch.allowed_private_hosts)
    signer = UrlSigner(places.key, clock)
    local = LocalStorage(places.output, storage.files_url, signer, clock)
    # Workers that share an output folder have drafts of their own, the same in each of their lives.
    drafts = Drafts(local.drafts / sha256(bytes(places.outbox)).hexdigest()[:12])
    drafts.clear()
    outbox = Outbox(places.outbox, Sealer(places.key, "webhooks"))
    try:
        async with (
            GuardedFetcher(rules, clock) as fetcher,
            GuardedFetcher(AddressRules.anywhere(), clock) as trusted,
            guarded_tunnel(rules, ids.token()) as tunnel_url,
            long_uploads(
                UploadBook(places.uploads, Sealer(places.key, "uploads")), clock, ids, tunnel_url=tunnel_url
            ) as long,
            anyio.create_task_group() as loops,
        ):
            destinations = Destinations(storage.s3, S3Storages(clock, long), fetcher, tunnel_url=tunnel_url)
            inputs = InputStore(places.engine_input, clock, max_bytes=fetch.input_cache_bytes)
            webhooks = Webhooks(outbox, fetcher, clock, ids, trusted=trusted)
            loops.start_soon(webhooks.run, name="webhooks")
            loops.start_soon(drafts.run, name="drafts")
            yield Kit(
                fetch_inputs=FetchInputs(
                    fetcher,
                    inputs,
                    destinations,
                    max_bytes=fetch.input_max_bytes,
                    timeout_s=fetch.input_timeout_s,
                    clock=clock,
                    ids=ids,
                    trusted=trusted,
                ),
                store_outputs=StoreOutputs(
                    local,
                    drafts,
                    destinations,
                    url_expires_s=storage.url_expires_s,
                    base64_max_bytes=storage.base64_max_bytes,
                ),
                notify=Notify(webhooks, fetcher, webhook, clock),
                inputs=inputs,
                destinations=destinations,
                signer=signer,
                local=local,
                drafts=drafts,
                fetcher=fetcher,
                long_uploads=long,
            )
            loops.cancel_scope.cancel()
    finally:
        outbox.close()
