"""The two servers that `bench/routing.py` compares: a bare handler that signs one ticket, and the real routing plane.

python -m bench._route_server bare|ours PORT FOLDER ENDPOINTS WORKERS
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import anyio
import msgspec
import uvicorn
from nacl.signing import SigningKey
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from comfyfleet import logs
from comfyfleet.clock import SystemClock
from comfyfleet.control.api.hot_paths import HotPaths, posts
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.keys import Keyring
from comfyfleet.control.plane import RoutingPlane
from comfyfleet.control.records import Endpoint
from comfyfleet.control.store.store import open_sqlite
from comfyfleet.control.worker import Worker
from comfyfleet.ids import SystemIds
from comfyfleet.listening import bind, serve
from comfyfleet.wire.routing import RouteRequest
from comfyfleet.wire.workers import WorkerStatusReport

ADMIN_KEY = "cfa_bench"


def bare() -> Starlette:
    """Parse the same body, sign one Ed25519 ticket, answer."""
    key = SigningKey.generate()
    decoder, encoder = msgspec.json.Decoder(RouteRequest), msgspec.json.Encoder()

    async def route(request: Request) -> Response:
        wanted = decoder.decode(await request.body())
        signature = key.sign(encoder.encode(wanted)).signature.hex()
        return Response(
            encoder.encode({"url": "http://127.0.0.1:3000", "ticket": signature}), media_type="application/json"
        )

    return Starlette(routes=[Route("/route/", route, methods=["POST"])])


async def ours(port: int, folder: Path, endpoints: int, workers: int) -> None:
    """The plane, with workers that have just reported ready; worker n has the token `t<n>`."""
    clock = SystemClock()
    catalog = Catalog(
        Endpoint(id=number + 1, endpoint_name=f"e{number}", created_at=0.0, cold_workers=0)
        for number in range(endpoints)
    )
    plane = RoutingPlane(
        data_dir=folder,
        catalog=catalog,
        keys=Keyring(admin_key=ADMIN_KEY, master=b"m" * 32, catalog=catalog, clock=clock),
        store=open_sqlite(folder / "control.sqlite3"),
        provider=None,
        environment=lambda endpoint, group: {},
        clock=clock,
        ids=SystemIds(),
    )
    now = clock.now()
    for number in range(workers):
        endpoint_id = number % endpoints + 1
        fresh = Worker(
            id=number + 1, endpoint_id=endpoint_id, group_id=0, mtoken=f"t{number + 1}", created_at=now, is_foreign=True
        )
        plane.workers.add(fresh, now, is_persisted=True)
        url = f"http://10.0.{number // 250}.{number % 250}:3000"
        plane.tickets.signature(url)
        plane.workers.report(
            WorkerStatusReport(id=number + 1, mtoken=f"t{number + 1}", loadtime=5.0, max_perf=1e6, url=url), now
        )
    plane.workers.take_changes()

    gc.freeze()
    await plane.load()
    app = HotPaths(Starlette(routes=plane.routes()), posts(plane.routes()))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(plane.run)
        await serve(app, bind("127.0.0.1", port))


if __name__ == "__main__":
    logs.configure(level="error")
    kind, port, folder, endpoints, workers = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:6])
    if kind == "bare":
        gc.freeze()
        uvicorn.run(
            bare(), host="127.0.0.1", port=port, log_level="error", access_log=False, loop="uvloop", http="httptools"
        )
    else:
        sys.setswitchinterval(0.0005)  # as `control.app.serve` does
        anyio.run(ours, port, folder, endpoints, workers, backend_options={"use_uvloop": True})
