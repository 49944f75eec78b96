"""The real, unmodified public worker framework around a stand-in model: a process with the documented variables."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from comfyfleet.testing.processes import free_port
from support.crowd_server import CrowdServer
from support.vastai import vastai_python

_SCRIPT = """
import sys, time
from vastai import Worker, WorkerConfig, HandlerConfig, LogActionConfig, BenchmarkConfig
port, log = int(sys.argv[1]), sys.argv[2]
open("began", "w").write(repr(time.time()))  # Python and its imports are up: from here on it is the framework
Worker(WorkerConfig(
    model_server_url="http://127.0.0.1", model_server_port=port, model_log_file=log,
    model_healthcheck_url="/health",
    handlers=[HandlerConfig(
        route="/generate/sync", allow_parallel_requests=False, max_queue_time=60.0,
        benchmark_config=BenchmarkConfig(dataset=[{"input": {}}], runs=1, concurrency=1, do_warmup=False),
    )],
    log_action_config=LogActionConfig(on_load=["MODEL READY"], on_error=["MODEL BROKEN"], on_info=[]),
)).run(host="127.0.0.1")
"""


class StandInModel:
    """What the worker forwards to: answers each job after `seconds`."""

    def __init__(self, seconds: float) -> None:
        model = self
        self.jobs = 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send({"ok": True})

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                model.jobs += 1
                time.sleep(seconds)
                self._send({"job": model.jobs})

            def _send(self, body: Any) -> None:
                raw = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *arguments: Any) -> None:
                return

        self._server = CrowdServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class PublicWorker:
    """Registered by hand, started as its container would."""

    def __init__(self, plane, endpoint: str, folder: Path, *, job_s: float = 0.05) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        status, made = plane.call("POST", "/v1/workers", {"endpoint": endpoint})
        assert status == 201, made
        self.id: int = made["id"]
        self.model = StandInModel(job_s)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / "model.log"
        self._log.touch()
        self._folder = folder
        self.output = folder / "worker.out"
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [str(vastai_python()), "-c", _SCRIPT, str(self.model.port), str(self._log)],
                cwd=folder,  # its benchmark cache is a file in the current directory
                env={
                    **kept,
                    **made["environment"],
                    "REPORT_ADDR": plane.base,
                    "WORKER_PORT": str(self.port),
                    "WORKER_HTTP_PORT": str(free_port()),
                    f"VAST_TCP_PORT_{self.port}": str(self.port),
                    "PUBLIC_IPADDR": "127.0.0.1",
                    "USE_SSL": "false",
                    "UNSECURED": "false",
                },
                stdout=output,
                stderr=output,
            )

    def framework_began_at(self) -> float:
        """Epoch s; 0 while it has not."""
        try:
            return float((self._folder / "began").read_text())
        except (OSError, ValueError):
            return 0.0

    def load(self) -> float:
        """The model says it is loaded: the load line is written. Epoch s."""
        with self._log.open("a") as log:
            log.write("MODEL READY\n")
        return time.time()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.model.close()
