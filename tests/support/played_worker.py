"""A worker that a test plays over HTTP: it reports to a control plane and answers jobs, as told. A thread, not a mock.

The agent's side of the protocol is played; the control plane and the client that talk to it are real.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from support.crowd_server import CrowdServer

Answer = tuple[int, Any]


class PlayedWorker:
    """Registers by hand, reports each 0.2 s, answers each job with `answer(call)` -> (status, body)."""

    def __init__(
        self,
        plane,
        endpoint: str,
        *,
        score: float = 1.0,
        answer: Callable[[dict], Answer] = lambda call: (200, {"ok": True}),
        reports: bool = True,
        **fields: Any,
    ) -> None:
        status, made = plane.call("POST", "/v1/workers", {"endpoint": endpoint})
        assert status == 201, made
        self.plane = plane
        self.id: int = made["id"]
        self.mtoken: str = made["mtoken"]
        self.score = score
        self.fields = fields
        self.calls: list[dict] = []
        self.working: dict[int, int] = {}
        self._answer = answer
        self._done: list[dict] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._server = CrowdServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._threads = [threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)]
        if reports:
            self.report()
            self._threads.append(threading.Thread(target=self._report_for_ever, daemon=True))
        for thread in self._threads:
            thread.start()

    def report(self, **fields: Any) -> int:
        """One `/worker_status/`, now; the answer's status."""
        with self._lock:
            working = sorted(self.working)
        body = {
            "id": self.id,
            "mtoken": self.mtoken,
            "version": "1.1.0",
            "loadtime": 5.3,
            "max_perf": self.score,
            "cur_load": 100.0 * len(working),
            "num_requests_working": len(working),
            "working_request_idxs": working,
            "error_msg": "",
            "url": self.url,
            **self.fields,
            **fields,
        }
        return self.plane.call("POST", "/worker_status/", body, key="")[0]

    def finish(self, *requests: dict) -> int:
        """One `/delete_requests/`."""
        body = {"worker_id": self.id, "mtoken": self.mtoken, "requests": list(requests)}
        return self.plane.call("POST", "/delete_requests/", body, key="")[0]

    @property
    def is_dead(self) -> bool:
        return self._stop.is_set()

    def die(self) -> None:
        """The machine is gone: no reports, connections refused, running answers cut off."""
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()

    def _report_for_ever(self) -> None:
        while not self._stop.wait(0.2):
            try:
                with self._lock:
                    done, self._done = self._done, []
                self.report()
                if done:
                    self.finish(*done)
            except (OSError, urllib.error.URLError):
                continue

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        worker = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                call = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                call["path"] = self.path
                request_idx = call.get("auth_data", {}).get("request_idx", 0)
                began = time.time()
                with worker._lock:
                    worker.calls.append(call)
                    worker.working[request_idx] = 1
                status, body = worker._answer(call)
                if worker._stop.is_set():
                    self.close_connection = True
                    return
                with worker._lock:
                    worker.working.pop(request_idx, None)
                    worker._done.append(_ended(request_idx, status, began))
                raw = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *arguments: Any) -> None:
                return

        return Handler


def _ended(request_idx: int, status: int, began: float) -> dict:
    if status == 429:
        return {"request_idx": request_idx, "success": False, "status": "Rejected", "entered_queue_at": began}
    return {  # whatever else the model answers is a success to the public framework, a 503 too
        "request_idx": request_idx,
        "success": True,
        "status": "Success",
        "entered_queue_at": began,
        "work_started_at": began,
        "work_completed_at": time.time(),
    }
