"""An engine on another machine is reached by HTTP alone, files included; and one that hears no interrupt holds up its
line, not the caller who cancelled: until its node ends, or until an engine of ours is given a new process.
"""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path

import aiohttp
import anyio
import pytest
from PIL import Image

from comfyfleet.testing.processes import a_worker, fake_engine, picture

pytestmark = [pytest.mark.slow, pytest.mark.anyio, pytest.mark.timeout(200)]


def a_photo() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), "teal").save(out, "PNG")
    return out.getvalue()


def deaf(gate: str) -> dict:
    """A picture that passes a node which hears no interrupt until `gate` is open."""
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 5}},
        "2": {"class_type": "FakeDeaf", "inputs": {"images": ["1", 0], "gate": gate}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "deaf"}},
    }


async def cancelled_while_deaf(worker, gate: str, folder: Path) -> None:
    """Start a deaf job, wait until the engine is in its node, cancel it, and see it end."""
    with anyio.fail_after(60):
        _, accepted = await worker.generate(deaf(gate), path="/generate")
        while not (folder / f"at-{gate}").exists():  # noqa: ASYNC110 - another process makes it
            await anyio.sleep(0.02)
        # A node that will say nothing for long was told when it began, however soon after the one before it.
        url, headers = f"{worker.base_url}/result/{accepted['id']}", {"Accept": "text/event-stream"}
        async with worker.session.get(url, headers=headers) as stream:
            async for line in stream.content:
                if b"FakeDeaf" in line:
                    break
        status, answer = await worker.post(f"/cancel/{accepted['id']}", {})
        assert (status, answer["cancelled"]) == (200, True)
        assert (await worker.get(f"/result/{accepted['id']}"))[0] == 499


async def test_an_engine_elsewhere_gets_its_inputs_gives_its_outputs_and_is_free_when_a_deaf_node_ends(tmp_path):
    engine = fake_engine(tmp_path / "engine", elsewhere=True)
    engine.start()
    try:
        await engine.until("/system_stats")
        async with a_worker(tmp_path, backends=(engine.base_url,)) as worker:
            # The engine's own description alone says that this input takes a file.
            photo = a_photo()
            graph = {
                "1": {
                    "class_type": "FakePicker",
                    "inputs": {"choice": f"data:image/png;base64,{base64.b64encode(photo).decode()}"},
                },
                "9": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "day/there"}},
            }
            status, answer = await worker.generate(graph)

            assert status == 200, answer
            (arrived,) = [path for path in (engine.folder / "engine" / "input").rglob("*") if path.is_file()]
            assert arrived.read_bytes() == photo
            (output,) = answer["output"]
            (rendered,) = [path for path in (engine.folder / "engine" / "output").rglob("*.png") if path.is_file()]
            assert output["sha256"] == hashlib.sha256(rendered.read_bytes()).hexdigest()
            assert (output["subfolder"], output["width"]) == ("day", 64)
            async with aiohttp.ClientSession() as session, session.get(output["url"]) as link:
                assert await link.read() == rendered.read_bytes()
            assert not any((tmp_path / "data").rglob("pulled/*"))  # what was brought over for the job went with it

            refused, body = await worker.generate(
                {**graph, "1": {"class_type": "FakePicker", "inputs": {"choice": "../../etc/passwd"}}}
            )
            assert (refused, body["error"]["details"]["node_id"]) == (422, "1")

            await cancelled_while_deaf(worker, "there", engine.folder)
            _, next_one = await worker.generate(picture(7), path="/generate")
            (engine.folder / "gate-there").touch()
            with anyio.fail_after(60):
                assert (await worker.result(next_one["id"]))[0] == 200
    finally:
        engine.kill()


async def test_an_engine_of_ours_that_hears_nothing_for_too_long_gets_a_new_process(tmp_path):
    async with a_worker(tmp_path, COMFYFLEET_STUCK_LIMIT_S="1") as worker:
        await cancelled_while_deaf(worker, "never", worker.folder)

        with anyio.fail_after(60):
            status, _ = await worker.generate(picture(7))

        assert status == 200
        _, health = await worker.get("/health")
        assert health["backends"][0]["restarts"] == 1
