"""The certificate authority's doors: `/static/jvastai_root.cer` (no key) and `/api/v0/sign_cert/` (a worker's own).

A worker shows its token and gets a certificate for the address it calls from, and no other; a managing key may ask for
any address. The stock start script of the public worker sends no token, and is refused.
"""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from comfyfleet.control.api.calling import add, read_body
from comfyfleet.control.auth import MANAGE
from comfyfleet.control.certificates import CertificateAuthority
from comfyfleet.control.keys import Keyring
from comfyfleet.control.records import WorkerRow
from comfyfleet.control.store.base import Store
from comfyfleet.control.worker import Worker
from comfyfleet.control.workers import Workers, check_token
from comfyfleet.web import bearer_key, whole_number
from comfyfleet.wire.errors import InvalidArguments, Unauthorized

MAX_REQUEST_BYTES = 16_384


def router(authority: CertificateAuthority, keyring: Keyring, workers: Workers, store: Store) -> APIRouter:
    """The routes. store: knows the workers of other control planes too."""
    routes = APIRouter(tags=["certificates"])

    async def root_certificate() -> Response:
        return PlainTextResponse(authority.pem, media_type="application/x-x509-ca-cert")

    async def sign_certificate(request: Request) -> Response:
        address = await allowed_address(request)
        signed = authority.sign(await read_body(request, MAX_REQUEST_BYTES), address)
        return PlainTextResponse(signed, media_type="application/x-pem-file")

    async def authenticate(worker_id: int, key: str) -> None:
        worker = workers.get(worker_id)
        if worker is None and (row := await store.get(WorkerRow, worker_id)) is not None:
            worker = msgspec.json.decode(row.body, type=Worker)
        check_token(worker, worker_id, key)

    async def allowed_address(request: Request) -> str:
        """The address this caller may have certified. Raises Unauthorized or InvalidArguments."""
        key, instance_id = bearer_key(request), request.query_params.get("instance_id", "")
        here = request.client.host if request.client is not None else ""
        try:
            if (worker_id := whole_number(instance_id)) is not None:
                await authenticate(worker_id, key)
                return here
        except Unauthorized:
            pass
        keyring.principal(key).demand_account_wide(MANAGE)
        address = request.query_params.get("address", "")
        if not address or len(address) > 253:
            raise InvalidArguments("`address` is needed: an IP address or a host name", field="address")
        return address

    add(routes, ["GET"], ["/static/jvastai_root.cer"], root_certificate, summary="The root certificate; no key")
    add(
        routes,
        ["POST"],
        ["/api/v0/sign_cert/"],
        sign_certificate,
        summary="A certificate for a signing request (PEM or DER)",
    )
    return routes
