"""A control plane whose local fleet is one worker over a fake engine, started with an environment of the test's."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from support.control_plane import ControlPlane

FAKE = f"{sys.executable} -m comfyfleet.testing.fake_engine"


class OneWorker:
    """A fleet of one whose worker is started with `environment`; `template` is a workergroup's template."""

    def __init__(self, folder: Path, template: str = "local", **environment: str) -> None:
        self.template = template
        self.plane = ControlPlane(
            folder / "control",
            arguments=["--fleet", "local", "--max-workers", "1"],
            environment={
                "COMFYFLEET_ENGINE_COMMAND": FAKE,
                "COMFYFLEET_ALLOWED_PRIVATE_HOSTS": "127.0.0.1",
                **environment,
            },
        )

    def __enter__(self) -> OneWorker:
        self.plane.start()
        endpoint = {"endpoint_name": "comfy", "cold_workers": 1, "max_workers": 1, "min_load": 1e9}
        assert self.plane.call("POST", "/api/v0/endptjobs/", endpoint)[0] == 200
        if self.template.endswith(".toml"):  # a template of the user's own, by its path
            self.template = self.plane.call("POST", "/api/v0/template/", {"name": self.template})[1]["hash_id"]
        group = {"endpoint_name": "comfy", "template_hash": self.template}
        assert self.plane.call("POST", "/api/v0/workergroups/", group)[0] == 200
        return self

    def __exit__(self, *_: object) -> None:
        self.plane.close()

    def model_log_with(self, text: str, limit_s: float = 60.0) -> str:
        """The log that foreign agents wait on, once it holds `text`: written just after the worker's state."""
        until = time.monotonic() + limit_s
        log = ""
        while time.monotonic() < until:
            for path in (self.plane.folder / "workers").glob("*/logs/model.log"):
                log = path.read_text()
                if text in log:
                    return log
            time.sleep(0.1)
        raise AssertionError(f"no {text!r} in {log!r}")

    def row_when(self, wanted, limit_s: float = 90.0) -> dict:
        """The worker's row, once `wanted(row)`."""
        until = time.monotonic() + limit_s
        rows: list[dict] = []
        while time.monotonic() < until:
            rows = self.plane.call("GET", "/v1/workers")[1]["workers"]
            for row in rows:
                if wanted(row):
                    return row
            time.sleep(0.1)
        raise AssertionError(f"{rows}\n{self.plane.log[-2000:]}")
