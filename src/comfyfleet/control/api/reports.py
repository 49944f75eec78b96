"""`POST /worker_status/` and `POST /delete_requests/`: what workers say. The worker's token is in the body.

A report that is refused (401) changes nothing. Unknown fields are ignored and missing ones have defaults, since
bootstrap scripts post partial reports.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from comfyfleet.control.api.calling import read_body
from comfyfleet.control.reports import Reports
from comfyfleet.control.worker import SILENT_AFTER_S
from comfyfleet.web import NOT_JSON, control_error
from comfyfleet.wire.errors import BadRequest, FleetError
from comfyfleet.wire.workers import FinishedRequests, ReportTaken, WorkerStatusReport

MAX_BODY_BYTES = 4 * 1024 * 1024

_status = msgspec.json.Decoder(WorkerStatusReport)
_finished = msgspec.json.Decoder(FinishedRequests)
T = TypeVar("T")
_OK = b'{"success":true}'
# After so long without a report nothing is routed to a worker, and later its name is another's (`checkup.ailment`). One
# of ours takes no ticket from before either; whoever names no incarnation cannot be replaced, and hears of no lease.
_OURS = msgspec.json.encode(ReportTaken(serve_for_s=SILENT_AFTER_S))


class ReportApi:
    """Handlers over one registry."""

    def __init__(self, reports: Reports) -> None:
        self._reports = reports

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/worker_status/", self.status, methods=["POST"]),
            Route("/delete_requests/", self.finished, methods=["POST"]),
        ]

    async def status(self, request: Request) -> Response:
        try:
            report = _decode(await read_body(request, MAX_BODY_BYTES), _status)
            self._reports.status(report)
        except FleetError as error:
            return control_error(error)
        return Response(_OURS if report.incarnation else _OK, media_type="application/json")

    async def finished(self, request: Request) -> Response:
        try:
            self._reports.finished(_decode(await read_body(request, MAX_BODY_BYTES), _finished))
        except FleetError as error:
            return control_error(error)
        return Response(_OK, media_type="application/json")


def _decode(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise BadRequest(str(error)) from error
    except NOT_JSON as error:
        raise BadRequest("the body is not JSON") from error
