"""Outputs reach a real S3 server whatever the network does, and where they cannot, the job is done all the same."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from comfyfleet.clock import SystemClock
from comfyfleet.ids import SystemIds
from comfyfleet.settings.outreach import FetchSettings, WebhookSettings
from comfyfleet.settings.storage import S3Settings, StorageSettings
from comfyfleet.testing.fault_proxy import Fault, fault_proxy
from comfyfleet.testing.s3_server import S3Server, s3_server
from comfyfleet.wire.errors import InputRefused, Unprocessable
from comfyfleet.wire.generation import GenerateInput, OutputEntry, S3Target
from comfyfleet.worker.engines.client import HistoryEntry
from comfyfleet.worker.stages.history_files import read_made
from comfyfleet.worker.stages.kit import Kit, KitPlaces, open_kit

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

MB = 1024 * 1024


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@asynccontextmanager
async def a_worker(folder: Path, s3: S3Settings | None, *allowed: str):
    """The stages as a worker has them."""
    places = KitPlaces(
        output=folder / "kept",
        engine_input=folder / "input",
        outbox=folder / "webhooks.sqlite3",
        uploads=folder / "uploads.sqlite3",
        key=b"k" * 32,
    )
    storage = StorageSettings(s3=s3, files_url="http://files.test")
    async with open_kit(
        places,
        storage,
        WebhookSettings(),
        FetchSettings(allowed_private_hosts=allowed),
        clock=SystemClock(),
        ids=SystemIds(),
    ) as kit:
        yield kit


def operator(s3: S3Server, **changes) -> S3Settings:
    given = {
        "bucket": s3.bucket,
        "access_key_id": s3.access_key_id,
        "secret_access_key": s3.secret_access_key,
        "endpoint_url": s3.endpoint_url,
        "connect_timeout_s": 2.0,
    }
    return S3Settings(**{**given, **changes})


def a_target(s3: S3Server, **changes) -> S3Target:
    given = {
        "access_key_id": s3.access_key_id,
        "secret_access_key": s3.secret_access_key,
        "endpoint_url": s3.endpoint_url,
        "bucket_name": s3.bucket,
    }
    return S3Target(**{**given, **changes})


async def store(kit: Kit, folder: Path, content: bytes, job: str, request: GenerateInput | None = None) -> OutputEntry:
    """One job whose engine wrote one file in a sub-folder."""
    path = folder / "engine" / "video" / "film.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    named = {"9": {"images": [{"filename": "film.bin", "subfolder": "video", "type": "output"}]}}
    [output] = await kit.store_outputs.run(
        read_made(HistoryEntry(outputs=named)),
        request_id=job,
        request=request or GenerateInput(),
        folders={"output": folder / "engine"},
    )
    return output


async def read(url: str) -> bytes:
    def get() -> bytes:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read()

    return await anyio.to_thread.run_sync(get)


async def test_the_environments_bucket_takes_the_file_and_its_link_gives_it_back(s3: S3Server, tmp_path: Path) -> None:
    async with a_worker(tmp_path, operator(s3)) as kit:
        output = await store(kit, tmp_path, b"a film", "job-1")

    assert output.upload_error == ""
    assert f"/{s3.bucket}/job-1/video/film.bin?" in output.url
    assert await read(output.url) == b"a film"
    assert Path(output.local_path).read_bytes() == b"a film"


async def test_a_request_brings_its_own_bucket_through_the_guarded_door(s3: S3Server, tmp_path: Path) -> None:
    content = b"x" * (15 * MB)
    async with a_worker(tmp_path, None, "127.0.0.1") as kit:
        output = await store(kit, tmp_path, content, "job-2", GenerateInput(s3=a_target(s3), expires_s=600))

    assert output.upload_error == ""
    assert "X-Amz-Expires=600" in output.url
    assert await read(output.url) == content


async def test_a_requests_private_endpoint_is_refused_before_and_while_it_is_used(s3: S3Server, tmp_path: Path) -> None:
    by_name = a_target(s3, endpoint_url=s3.endpoint_url.replace("127.0.0.1", "localhost"))
    async with a_worker(tmp_path, None) as kit:
        with pytest.raises(InputRefused):
            kit.check(GenerateInput(s3=a_target(s3)))
        kit.check(GenerateInput(s3=by_name))  # a name: only its resolution tells
        output = await store(kit, tmp_path, b"a film", "job-3", GenerateInput(s3=by_name))

    assert output.upload_error
    assert output.url.startswith("http://files.test/files/job-3/")


async def test_a_requests_endpoint_needs_its_own_keys(s3: S3Server, tmp_path: Path) -> None:
    async with a_worker(tmp_path, operator(s3), "127.0.0.1") as kit:
        with pytest.raises(Unprocessable) as refusal:
            kit.check(GenerateInput(s3=S3Target(endpoint_url="http://203.0.113.7/")))

    assert refusal.value.details["field"] == "input.s3.endpoint_url"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"secret_access_key": "wrong"}, "refused|denied"),
        ({"access_key_id": "nobody"}, "refused|denied"),
        ({"bucket": "no-such-bucket"}, "bucket|denied"),
        ({"endpoint_url": "http://127.0.0.1:9"}, "reached"),
        ({"endpoint_url": "http://no-such-host.invalid"}, "reached"),
        ({"endpoint_url": "nonsense"}, "."),
    ],
)
async def test_an_s3_that_does_not_work_costs_the_upload_not_the_job(
    s3: S3Server, tmp_path: Path, changes: dict, words: str
) -> None:
    async with a_worker(tmp_path, operator(s3, attempts=2, **changes)) as kit:
        with anyio.fail_after(90):
            output = await store(kit, tmp_path, b"a film", "job-4")

    assert (output.error, output.size_bytes) == ("", 6)
    assert re.search(words, output.upload_error)
    assert output.url.startswith("http://files.test/files/job-4/video/film.bin?")
    assert s3.secret_access_key not in output.upload_error
    assert str(tmp_path) not in output.upload_error


@pytest.mark.parametrize(
    "fault",
    [Fault(status=503), Fault(status=500), Fault(reset=True), Fault(cut_after=1000)],
    ids=lambda one: str(one)[6:40],
)
async def test_a_fault_at_first_is_overcome(s3: S3Server, tmp_path: Path, fault: Fault) -> None:
    async with fault_proxy(s3.port) as proxy, a_worker(tmp_path, operator(s3, endpoint_url=proxy.url)) as kit:
        proxy.faults = lambda number: fault if number < 2 else Fault()
        output = await store(kit, tmp_path, b"a film" * 1000, "job-5")

        assert output.upload_error == ""
        assert proxy.connections >= 3
        assert await read(output.url) == b"a film" * 1000


async def test_a_server_that_never_recovers_is_given_up(s3: S3Server, tmp_path: Path) -> None:
    async with fault_proxy(s3.port) as proxy, a_worker(tmp_path, operator(s3, endpoint_url=proxy.url)) as kit:
        proxy.faults = lambda _: Fault(status=500)
        output = await store(kit, tmp_path, b"a film", "job-6")

    assert "server error" in output.upload_error
    assert proxy.connections >= 3


async def test_a_cut_upload_goes_on_where_it_was(s3: S3Server, tmp_path: Path) -> None:
    """Of a file of 40 MB the first connections are cut in the middle of a part: the others are not sent again."""
    content = bytes(range(256)) * (40 * MB // 256)
    async with fault_proxy(s3.port) as proxy, a_worker(tmp_path, operator(s3, endpoint_url=proxy.url)) as kit:
        proxy.faults = lambda number: Fault(cut_after=7 * MB) if number < 4 else Fault()
        output = await store(kit, tmp_path, content, "job-7")

        assert output.upload_error == ""
        assert await read(output.url) == content
    assert len(content) + MB < proxy.to_server < len(content) + 21 * MB


async def test_a_file_that_arrived_before_a_restart_does_not_travel_again(s3: S3Server, tmp_path: Path) -> None:
    content = bytes(range(256)) * (10 * MB // 256)
    async with fault_proxy(s3.port) as proxy:
        for _ in range(2):
            async with a_worker(tmp_path, operator(s3, endpoint_url=proxy.url)) as kit:
                output = await store(kit, tmp_path, content, "job-10")
                assert output.upload_error == ""
        async with a_worker(tmp_path, operator(s3, endpoint_url=proxy.url)) as kit:
            changed = await store(kit, tmp_path, content[::-1], "job-10")
            sent = proxy.to_server
            assert await read(changed.url) == content[::-1]

    assert 2 * len(content) < sent < 2 * len(content) + MB


async def test_an_outage_in_the_middle_of_a_long_upload_is_waited_out(s3: S3Server, tmp_path: Path) -> None:
    content = bytes(20 * MB)
    async with (
        fault_proxy(s3.port) as proxy,
        a_worker(tmp_path, operator(s3, endpoint_url=proxy.url, attempts=1)) as kit,
    ):
        proxy.faults = lambda number: (
            Fault(cut_after=7 * MB) if number < 4 else Fault(status=503) if number < 6 else Fault()
        )
        output = await store(kit, tmp_path, content, "job-11")

    assert output.upload_error == ""


async def test_a_slow_upload_does_not_hold_up_other_jobs(s3: S3Server, tmp_path: Path) -> None:
    done = []
    async with fault_proxy(s3.port) as proxy, a_worker(tmp_path, operator(s3), "127.0.0.1") as kit:
        proxy.hold(0)
        slow = GenerateInput(s3=a_target(s3, endpoint_url=proxy.url))

        async def run(job: str, request: GenerateInput | None) -> None:
            output = await store(kit, tmp_path / job, b"a film", job, request)
            done.append((job, output.upload_error))

        async with anyio.create_task_group() as jobs:
            jobs.start_soon(run, "slow", slow)
            await proxy.until_held()
            await run("quick", None)
            proxy.release()

    assert done == [("quick", ""), ("slow", "")]


async def test_a_result_that_is_read_later_has_a_fresh_link(s3: S3Server, tmp_path: Path) -> None:
    async with a_worker(tmp_path, operator(s3)) as kit:
        output = await store(kit, tmp_path, b"a film", "job-8", GenerateInput(expires_s=1))
        stale = output.url
        await anyio.sleep(2.1)  # the S3 server's clock decides
        with pytest.raises(urllib.error.HTTPError) as refusal:
            await read(stale)
        refusal.value.close()
        await kit.store_outputs.resign([output], request=GenerateInput(expires_s=60))

        assert output.url != stale
        assert await read(output.url) == b"a film"


async def test_an_input_may_lie_in_s3(s3: S3Server, tmp_path: Path) -> None:
    graph = {"1": {"class_type": "LoadLatent", "inputs": {"latent": f"s3://{s3.bucket}/job-9/video/film.bin"}}}
    async with a_worker(tmp_path, operator(s3)) as kit:  # the operator's own store may be on a private address
        await store(kit, tmp_path, b"bytes in a bucket", "job-9")
        by_environment = await kit.fetch_inputs.run(graph, GenerateInput())
        with pytest.raises(InputRefused, match="not a public address"):
            await kit.fetch_inputs.run(graph, GenerateInput(s3=a_target(s3)))
    async with a_worker(tmp_path, None, "127.0.0.1") as kit:
        by_request = await kit.fetch_inputs.run(graph, GenerateInput(s3=a_target(s3)))

    name = by_environment.graph["1"]["inputs"]["latent"]
    assert (tmp_path / "input" / name).read_bytes() == b"bytes in a bucket"
    assert by_request.graph == by_environment.graph
