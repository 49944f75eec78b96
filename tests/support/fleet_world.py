"""A whole fleet on this machine: control plane, local workers, a fake ComfyUI under each; all real processes."""

from __future__ import annotations

import json
import sys
import textwrap
import time
import urllib.request
from pathlib import Path
from typing import Any

from support.control_plane import ControlPlane
from support.vastai import run_vastai

JOB_S = 0.05


def a_graph(number: int = 0, *, fault: str = "", sleep_s: float = 0.0, gate: str = "") -> dict[str, Any]:
    """A picture no other number has, so that no cache answers for it. gate: it waits for `FleetWorld.open_gate`."""
    graph = {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": number % 0xFFFFFF},
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": f"p{number}"}},
    }
    if fault:
        graph["3"] = {"class_type": "FakeFault", "inputs": {"images": ["1", 0], "fault": fault}}
        graph["2"]["inputs"]["images"] = ["3", 0]
    if sleep_s:
        graph["4"] = {"class_type": "FakeSleep", "inputs": {"images": ["1", 0], "seconds": sleep_s}}
        graph["2"]["inputs"]["images"] = ["4", 0]
    if gate:
        graph["5"] = {"class_type": "FakeGate", "inputs": {"images": ["1", 0], "gate": gate}}
        graph["2"]["inputs"]["images"] = ["5", 0]
    return graph


class FleetWorld:
    """`submit`, `until`, and the ledger in which each fake engine wrote what it rendered."""

    def __init__(self, folder: Path, *, workers: int = 1, job_s: float = JOB_S, **environment: str) -> None:
        self.folder = folder
        self.ledger = folder / "renders.log"
        command = f"{sys.executable} -m comfyfleet.testing.fake_engine --job-s {job_s} --ledger {self.ledger}"
        self.workers = workers
        self.plane = ControlPlane(
            folder / "control",
            arguments=["--fleet", "local", "--max-workers", str(workers)],
            environment={
                "COMFYFLEET_ENGINE_COMMAND": command,
                "COMFYFLEET_ALLOWED_PRIVATE_HOSTS": "127.0.0.1",
                **environment,
            },
        )

    def start(self) -> FleetWorld:
        """The control plane, unless it runs already, the endpoint `comfy`, and its workers, ready."""
        if self.plane.process is None:
            self.plane.start()
        body = {
            "endpoint_name": "comfy",
            "cold_workers": self.workers,
            "max_workers": self.workers,
            "min_load": 1e9,  # every worker stays active
            "max_queue_time": 30,
        }
        assert self.plane.call("POST", "/api/v0/endptjobs/", body)[0] == 200
        group = {"endpoint_name": "comfy", "template_hash": "local"}
        assert self.plane.call("POST", "/api/v0/workergroups/", group)[0] == 200
        self.until_ready()
        return self

    def until_ready(self, limit_s: float = 120.0) -> None:
        until = time.monotonic() + limit_s
        while sum(row["status"] == "idle" for row in self.worker_rows()) < self.workers:
            assert time.monotonic() < until, f"workers: {self.worker_rows()}\n{self.plane.log[-3000:]}"
            time.sleep(0.2)

    def worker_rows(self) -> list[dict[str, Any]]:
        return self.plane.call("GET", "/v1/workers")[1]["workers"]

    def open_gate(self, name: str) -> None:
        """Let the renders go on that wait at this gate."""
        self.ledger.with_name(f"gate-{name}").touch()

    def submit(
        self, number: int, *, key: str | None = None, fault: str = "", sleep_s: float = 0.0, gate: str = "", **fields
    ) -> str:
        graph = a_graph(number, fault=fault, sleep_s=sleep_s, gate=gate)
        body = {"endpoint": "comfy", "input": {"workflow_json": graph}, **fields}
        status, answer = self.plane.call("POST", "/v1/jobs", body, key=key)
        assert status == 202, answer
        return answer["id"]

    def job(self, job_id: str, *, key: str | None = None) -> dict[str, Any]:
        return self.plane.call("GET", f"/v1/jobs/{job_id}", key=key)[1]

    def until(self, job_id: str, *statuses: str, limit_s: float = 120.0) -> dict[str, Any]:
        """The job, once it has one of these statuses (final ones unless said otherwise)."""
        wanted = statuses or ("completed", "failed", "cancelled")
        until = time.monotonic() + limit_s
        while (job := self.job(job_id))["status"] not in wanted:
            assert time.monotonic() < until, f"{job}\n{self.plane.log[-3000:]}"
            time.sleep(0.05)
        return job

    def events(self, job_id: str, *, after: int = 0, limit_s: float = 120.0) -> list[tuple[int, str, dict[str, Any]]]:
        """(seq, kind, data) of each event until the stream ends."""
        request = urllib.request.Request(
            f"{self.plane.base}/v1/jobs/{job_id}/events",
            headers={"Authorization": f"Bearer {self.plane.key}", "Last-Event-ID": str(after)},
        )
        with urllib.request.urlopen(request, timeout=limit_s) as answer:
            frames = answer.read().decode().split("\n\n")
        found = []
        for frame in frames:
            fields = dict(line.split(": ", 1) for line in frame.splitlines() if not line.startswith(":"))
            if "id" in fields:
                found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
        return found

    def every_job(self) -> list[str]:
        """The id of every job there is, page by page."""
        found: list[str] = []
        page = self.plane.call("GET", "/v1/jobs?limit=500")[1]
        while page["jobs"]:
            found.extend(job["id"] for job in page["jobs"])
            if page["next"] is None:
                break
            page = self.plane.call("GET", f"/v1/jobs?limit=500&before={page['next']}")[1]
        return found

    def rendered_files(self) -> list[Path]:
        """What the engines saved for `a_graph`s, in their own folders."""
        return list((self.folder / "control" / "workers").glob("*/engine/output-*/p*.png"))

    def close(self) -> None:
        self.plane.close()


def asked(world: FleetWorld, body: str, **values: Any) -> Any:
    """The RESULT of `body`, run by the real client, open, with the world's `endpoint` at hand."""
    opened = """
        async with Serverless(KEY, autoscaler_url=BASE, webserver_url=BASE) as client:
            endpoint = await client.get_endpoint(name="comfy")
    """
    snippet = textwrap.dedent(opened).rstrip() + "\n" + textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    return run_vastai(snippet, base=world.plane.base, key=world.plane.key, timeout_s=200, **values)
