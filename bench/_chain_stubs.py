"""Stand-ins for `bench.chain`: a control plane that routes everything to one worker, and a model that answers at once.

python _chain_stubs.py control PORT WORKER_URL
python _chain_stubs.py model PORT
"""

from __future__ import annotations

import base64
import json
import sys
from itertools import count

from aiohttp import web
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat


def control(url: str) -> web.Application:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    message = json.dumps({"url": url}, indent=4, sort_keys=True).encode()
    signature = base64.b64encode(key.sign(message, padding.PKCS1v15(), hashes.SHA256())).decode()
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    numbers, ready = count(1), set()
    listed = {"id": 1, "endpoint_name": "chain", "api_key": "k", "user_id": 1, "created_at": 0}

    async def route(request: web.Request) -> web.Response:
        asked = await request.json()
        number = asked.get("request_idx") or next(numbers)
        auth = {"endpoint": "chain", "url": url, "cost": asked["cost"], "reqnum": next(numbers), "request_idx": number}
        return web.json_response({**auth, "signature": signature})

    async def status(request: web.Request) -> web.Response:
        told = await request.json()
        if told.get("loadtime", 0) > 0 and told.get("max_perf", 0) > 0:
            ready.add(told["id"])
        return web.json_response({})

    async def finished(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response({})

    async def public_key(_: web.Request) -> web.Response:
        return web.Response(text=pem)

    async def endpoints(_: web.Request) -> web.Response:
        return web.json_response({"success": True, "results": [listed]})

    async def is_ready(_: web.Request) -> web.Response:
        return web.Response(status=200 if ready else 503)

    app = web.Application()
    app.router.add_post("/route/", route)
    app.router.add_post("/worker_status/", status)
    app.router.add_post("/delete_requests/", finished)
    app.router.add_get("/pubkey/", public_key)
    app.router.add_get("/api/v0/endptjobs/", endpoints)
    app.router.add_get("/is_ready", is_ready)
    return app


def model() -> web.Application:
    async def generate(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response({"status": "completed", "output": []})

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"ok": True})

    app = web.Application()
    app.router.add_post("/generate/sync", generate)
    app.router.add_get("/health", health)
    return app


if __name__ == "__main__":
    made = control(sys.argv[3]) if sys.argv[1] == "control" else model()
    web.run_app(made, host="127.0.0.1", port=int(sys.argv[2]), access_log=None, print=None)
