"""Whatever the wrapper's own description allows, and much that it does not: no request makes the worker fail."""

from __future__ import annotations

import sys
from pathlib import Path

import anyio
import pytest

from comfyfleet.testing.processes import a_worker

pytestmark = [pytest.mark.slow, pytest.mark.anyio, pytest.mark.timeout(280)]


@pytest.mark.parametrize(
    ("phases", "examples"),
    [
        ("fuzzing", "12"),
        pytest.param("coverage,fuzzing,stateful", "100", marks=[pytest.mark.soak, pytest.mark.timeout(900)]),
    ],
)
async def test_schemathesis_finds_no_server_error(tmp_path: Path, phases: str, examples: str) -> None:
    async with a_worker(tmp_path) as worker:
        command = [
            str(Path(sys.executable).with_name("schemathesis")),
            *("run", f"{worker.base_url}/openapi.json", "--url", worker.base_url),
            *("--checks", "not_a_server_error", "--phases", phases),
            *("--max-examples", examples, "--seed", "1", "--no-color", "--generation-database", "none"),
        ]
        run = await anyio.run_process(command, check=False, cwd=tmp_path)
        status, answer = await worker.get("/health")

    assert run.returncode == 0, run.stdout.decode()[-4000:]
    assert "12 total" in run.stdout.decode(), "routes came or went: is the description complete?"
    assert (status, answer["ready"]) == (200, True)
