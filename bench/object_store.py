"""A stand-in for a slow object store: takes every PUT and multipart upload, after a wait, and forgets the bytes.

Not an S3 server (the tests use a real one): it exists so that uploads cost time and nothing else on this machine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from aiohttp import web


@asynccontextmanager
async def slow_store(wait_s: float) -> AsyncIterator[dict[str, str]]:
    """The environment that makes a worker upload there."""

    async def drain(request: web.Request) -> int:
        size = 0
        async for chunk in request.content.iter_chunked(1 << 20):
            size += len(chunk)
        return size

    async def put(request: web.Request) -> web.Response:
        await drain(request)
        await anyio.sleep(wait_s)
        return web.Response(headers={"ETag": '"etag"'})

    async def post(request: web.Request) -> web.Response:
        await drain(request)
        if "uploads" in request.query:
            name, inner = "InitiateMultipartUploadResult", "<UploadId>upload</UploadId>"
        else:
            name, inner = "CompleteMultipartUploadResult", '<ETag>"etag"</ETag><Location>x</Location>'
        text = f'<?xml version="1.0"?><{name}><Bucket>b</Bucket><Key>k</Key>{inner}</{name}>'
        return web.Response(text=text, content_type="application/xml")

    async def head(_request: web.Request) -> web.Response:
        return web.Response(status=404)

    app = web.Application(client_max_size=0)
    app.router.add_route("HEAD", "/{path:.*}", head)
    app.router.add_put("/{path:.*}", put)
    app.router.add_post("/{path:.*}", post)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        yield {
            "S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "S3_BUCKET_NAME": "bench",
            "S3_ACCESS_KEY_ID": "bench",
            "S3_SECRET_ACCESS_KEY": "bench-secret",
            "S3_REGION": "us-east-1",
        }
    finally:
        await runner.cleanup()
