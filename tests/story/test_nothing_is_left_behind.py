"""However `comfyfleet up` ends, it leaves no process and no half-written output under its final name."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import anyio
import av
import psutil
import pytest

from comfyfleet import Serverless
from support.machine import Machine, a_machine, document_payload, small_song

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


async def start_a_long_render(machine: Machine, scope: anyio.CancelScope) -> None:
    """Returns once the engine is sampling; the request is left hanging."""
    async with Serverless(machine.key, url=machine.url) as client:
        endpoint = await client.get_endpoint(name="comfyui-json")
        payload = document_payload(small_song(steps=1_000))  # some seconds: a restarted worker renders it to its end
        await endpoint.request(
            "/generate/sync", payload, on_progress=lambda shown: scope.cancel() if shown["percentage"] > 0 else None
        )


async def render_until_it_samples(machine: Machine, then: signal.Signals, pid: int) -> None:
    with anyio.CancelScope() as scope:
        await start_a_long_render(machine, scope)
    os.kill(pid, then)


def still_runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it went between the two questions
        return False


def half_written(data_dir: Path) -> list[Path]:
    """Media files under a final name that cannot be read to their end."""
    broken = []
    for path in data_dir.rglob("*"):
        if path.suffix in (".mp3", ".mp4", ".png") and path.is_file():
            try:
                with av.open(str(path)) as container:
                    assert sum(1 for _ in container.decode())
            except Exception:
                broken.append(path)
    return broken


async def test_sigterm_in_the_middle_of_a_render_ends_everything(tmp_path: Path) -> None:
    with a_machine(tmp_path / "data") as machine:
        machine.wait_ready()
        running = machine.processes()
        assert len(running) >= 3

        await render_until_it_samples(machine, signal.SIGTERM, machine.process.pid)
        machine.process.wait(timeout=120)

        assert [process for process in running if still_runs(process)] == []
        assert machine.processes() == []
        assert half_written(machine.data_dir) == []


async def test_after_kill_9_the_next_up_cleans_up_and_starts(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with a_machine(data_dir) as machine:
        machine.wait_ready()
        await render_until_it_samples(machine, signal.SIGKILL, machine.process.pid)
        machine.process.wait(timeout=120)
        orphans = machine.processes()

        with a_machine(data_dir) as again:
            again.wait_ready()
            for orphan in orphans:
                assert not still_runs(orphan)
            async with Serverless(again.key, url=again.url) as client:
                endpoint = await client.get_endpoint(name="comfyui-json")
                outcome = await endpoint.request("/generate/sync", document_payload(small_song()))
            assert outcome["ok"], outcome["text"]
        assert half_written(data_dir) == []
