"""`Serverless`: the client, with the surface the documents use.

    async with Serverless() as client:
        endpoint = await client.get_endpoint(name="comfyui-json")
        response = await endpoint.request("/generate/sync", payload)

Address and key come from arguments, the environment or the file `comfyfleet up` writes (see `settings.client`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from comfyfleet.client.discovery import find_control_plane
from comfyfleet.client.endpoint import Endpoint
from comfyfleet.client.request import RequestOutcome
from comfyfleet.client.stream import TransportFailure
from comfyfleet.client.transport import Transport, control_plane_error
from comfyfleet.clock import Clock, SystemClock
from comfyfleet.ids import Ids, SystemIds
from comfyfleet.retry import SHORT
from comfyfleet.wire.errors import NotFound, Unavailable

log = logging.getLogger("comfyfleet")


class Serverless:
    """An async context manager. `autoscaler_url` and `webserver_url` are accepted for the known client's users.

    max_poll_interval caps, in seconds, every wait between repeats.
    """

    def __init__(
        self,
        api_key: str | None = None,
        *,
        url: str | None = None,
        autoscaler_url: str | None = None,
        webserver_url: str | None = None,
        debug: bool = False,
        connection_limit: int = 500,
        max_poll_interval: float = 5.0,
        clock: Clock | None = None,
        ids: Ids | None = None,
    ) -> None:
        found = find_control_plane(url=url or autoscaler_url or webserver_url, api_key=api_key)
        self.url = found.url
        self.api_key = found.api_key
        self.max_poll_interval_s = max_poll_interval
        self.clock: Clock = clock or SystemClock()
        self.ids: Ids = ids or SystemIds()
        self.transport = Transport(connection_limit=connection_limit, ca_url=f"{self.url}/static/jvastai_root.cer")
        if debug:
            log.setLevel(logging.DEBUG)
            if not log.handlers:  # ours alone: what the rest of the program logs is its own business
                log.addHandler(logging.StreamHandler())

    async def __aenter__(self) -> Serverless:
        await self.transport.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def is_open(self) -> bool:
        return self.transport.is_open

    async def close(self) -> None:
        await self.transport.close()

    async def get_endpoints(self) -> list[Endpoint]:
        """Every endpoint this key may see."""
        listing = await self.get("/api/v0/endptjobs/")
        return [
            Endpoint(self, name=str(row["endpoint_name"]), id=int(row["id"]), api_key=str(row["api_key"]))
            for row in listing["results"]
        ]

    async def get_endpoint(self, name: str) -> Endpoint:
        """The endpoint of that name; raises NotFound."""
        for endpoint in await self.get_endpoints():
            if endpoint.name == name:
                return endpoint
        raise NotFound(f"Endpoint {name} could not be found", endpoint=name)

    async def queue_endpoint_request(
        self,
        endpoint: Endpoint,
        worker_route: str,
        worker_payload: Mapping[str, Any],
        **options: Any,
    ) -> RequestOutcome:
        """The known client's long form of `endpoint.request`."""
        return await endpoint.request(worker_route, worker_payload, **options)

    async def get(self, path: str) -> Any:
        """GET a management path; retried while the control plane restarts. Raises the FleetError it answers."""
        return await self._manage("GET", path, None)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST to a management path that is safe to repeat."""
        return await self._manage("POST", path, dict(body))

    async def _manage(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        waits = [*SHORT.delays(self.ids), None]
        for wait_s in waits:
            try:
                answer = await self.transport.call(method, f"{self.url}{path}", json=body, key=self.api_key)
            except TransportFailure as failure:
                if wait_s is None:
                    raise Unavailable(f"no answer from the control plane at {self.url}: {failure}") from failure
            else:
                if answer.status < 500 or wait_s is None:
                    if answer.status // 100 != 2:
                        raise control_plane_error(answer)
                    return answer.body
            log.debug("control plane not ready, trying again in %.1f s", wait_s)
            await self.clock.sleep(wait_s)
        raise AssertionError("unreachable: the last round returns or raises")
