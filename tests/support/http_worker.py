"""A worker's HTTP side, whose every answer a test sets: good, bad and none."""

from __future__ import annotations

import aiohttp
import anyio
import msgspec
from aiohttp import web

from comfyfleet.control.worker_calls import WorkerCalls
from comfyfleet.wire.routing import RouteReady


class HttpWorker:
    """`answers`: path -> (status, body or stream, headers), given each time; `scripts`: one after the other."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, object, dict[str, str]]] = {}
        self.scripts: dict[str, list[tuple[int, object, dict[str, str]]]] = {}
        self.heard: list[tuple[str, dict]] = []
        self.held: set[str] = set()  # paths whose calls get no answer
        self._news = anyio.Event()

    async def __aenter__(self):
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._answer)
        self.runner = web.AppRunner(app, handler_cancellation=True)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
        self._session = aiohttp.ClientSession()
        self.calls = WorkerCalls(self._session)
        return self

    async def __aexit__(self, *_error):
        await self._session.close()
        await self.runner.cleanup()

    async def _answer(self, request):
        self.heard.append((request.path, msgspec.json.decode(await request.read())))
        self._news.set()
        self._news = anyio.Event()
        if request.path in self.held:
            await anyio.sleep_forever()
        script = self.scripts.get(request.path)
        answer = script.pop(0) if script else self.answers.get(request.path, (404, "404: Not Found", {}))
        status, body, headers = answer
        if isinstance(body, list):
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for part in body:
                await response.write(part)
            request.transport.close()
            return response
        if isinstance(body, str):
            return web.Response(status=status, text=body, headers=headers)
        return web.json_response(body, status=status, headers=headers)

    async def asked(self, path: str) -> None:
        """Returns once this path was called."""
        while path not in [heard for heard, _ in self.heard]:
            await self.news()

    async def news(self) -> None:
        """Returns after the next call, of whatever path."""
        await self._news.wait()

    def ticket(self) -> RouteReady:
        return RouteReady(
            endpoint="e", url=self.url, cost=100.0, reqnum=1, request_idx=2, signature="s", ticket="t", request_id="r"
        )
