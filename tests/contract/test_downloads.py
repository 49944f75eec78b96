"""The downloader against a server that does what servers do: cut, drip, refuse, redirect, change, tell wrong sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import anyio
import pytest

from comfyfleet.clock import SystemClock
from comfyfleet.provision.staging import part_path
from comfyfleet.provision.transfer import TransferLimits
from comfyfleet.retry import Backoff
from comfyfleet.settings.provision import SourceSettings
from comfyfleet.wire.errors import DiskFull, ProvisionFailed
from support.downloads import CHUNK, CONTENT, a_downloader, a_model, download, the_file
from support.model_server import Hosted, ModelServer, a_safetensors_file, model_server

pytestmark = pytest.mark.anyio


@pytest.fixture
def server():
    with model_server() as running:
        yield running


def test_files_of_the_test_server_are_whole():
    length = int.from_bytes(CONTENT[:8], "little")
    assert json.loads(CONTENT[8 : 8 + length])["w"]["data_offsets"][1] + 8 + length == len(CONTENT)


async def test_a_file_arrives_by_ranges_each_byte_once(server: ModelServer, tmp_path: Path):
    hosted = Hosted(CONTENT)
    url = server.add("/song", hosted)

    progress = await download(url, tmp_path, size_bytes=len(CONTENT), sha256=hosted.sha256)

    assert the_file(tmp_path).read_bytes() == CONTENT
    assert server.sent("/song") == len(CONTENT) == progress.fetched_bytes
    assert len([asked for asked in server.log if asked.method == "GET"]) == 11
    assert [path.name for path in the_file(tmp_path).parent.iterdir()] == ["song.safetensors"]


async def test_what_broke_off_goes_on_where_it_stopped(server: ModelServer, tmp_path: Path):
    hosted = Hosted(CONTENT, cut_after=[1000, 30_000, 0, 50_000])
    url = server.add("/song", hosted)

    await download(url, tmp_path, sha256=hosted.sha256)

    assert the_file(tmp_path).read_bytes() == CONTENT
    assert server.sent("/song") == len(CONTENT)


async def test_a_server_without_ranges_is_read_in_one_piece_and_again_after_a_cut(server: ModelServer, tmp_path: Path):
    hosted = Hosted(CONTENT, has_ranges=False, cut_after=[100_000])
    url = server.add("/song", hosted)

    await download(url, tmp_path, sha256=hosted.sha256)

    assert the_file(tmp_path).read_bytes() == CONTENT
    assert server.sent("/song") == len(CONTENT) + 100_000


async def test_a_body_of_untold_length_is_taken_whole(server: ModelServer, tmp_path: Path):
    hosted = Hosted(CONTENT, has_ranges=False, is_chunked=True, etag="")
    url = server.add("/song", hosted)

    await download(url, tmp_path, sha256=hosted.sha256)

    assert the_file(tmp_path).read_bytes() == CONTENT


async def test_a_wrong_digest_gives_no_file_and_says_both(server: ModelServer, tmp_path: Path):
    url = server.add("/song", Hosted(CONTENT))

    with pytest.raises(ProvisionFailed, match=rf"SHA-256 is {Hosted(CONTENT).sha256}, not {'0' * 64}"):
        await download(url, tmp_path, sha256="0" * 64)

    assert not the_file(tmp_path).exists()


async def test_a_wrong_size_is_refused_before_its_bytes_are_taken(server: ModelServer, tmp_path: Path):
    url = server.add("/song", Hosted(CONTENT))

    with pytest.raises(ProvisionFailed, match=f"the source has {len(CONTENT)} bytes, not 99"):
        await download(url, tmp_path, size_bytes=99)

    assert server.sent("/song") <= CHUNK
    assert not the_file(tmp_path).exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (CONTENT[:-1000], "its header tells of"),
        (b"<!DOCTYPE html><title>Sign in</title>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer"),
        (b"\x00" * 5000, "no safetensors header"),
    ],
)
async def test_what_is_no_whole_model_never_gets_its_name(server: ModelServer, tmp_path: Path, content, words):
    url = server.add("/song", Hosted(content))

    with pytest.raises(ProvisionFailed, match=words):
        await download(url, tmp_path)

    assert not the_file(tmp_path).exists()


async def test_a_web_page_in_place_of_a_file_is_named(server: ModelServer, tmp_path: Path):
    url = server.add("/song", Hosted(b"<html>log in</html>", content_type="text/html; charset=utf-8"))

    with pytest.raises(ProvisionFailed, match="answered with a web page"):
        await download(url, tmp_path)


async def test_429_is_waited_out_as_long_as_the_server_says(server: ModelServer, tmp_path: Path):
    hosted = Hosted(CONTENT, refusals=[(429, {"Retry-After": "1"}), (503, {})])
    url = server.add("/song", hosted)
    clock = SystemClock()
    began = clock.monotonic()

    await download(url, tmp_path)

    assert the_file(tmp_path).read_bytes() == CONTENT
    assert clock.monotonic() - began >= 1.0


async def test_a_missing_file_is_not_asked_for_twice(server: ModelServer, tmp_path: Path):
    with pytest.raises(ProvisionFailed, match="answered 404"):
        await download(server.base + "/none", tmp_path)

    assert len(server.log) == 1


async def test_a_server_that_stays_broken_is_given_up_with_its_reason(server: ModelServer, tmp_path: Path):
    url = server.add("/song", Hosted(CONTENT, refusals=[(500, {})] * 50))

    with pytest.raises(ProvisionFailed, match="gave up: HTTP 500"):
        await download(url, tmp_path)


async def test_a_drip_is_given_up_for_a_new_connection_and_its_bytes_kept(server: ModelServer, tmp_path: Path):
    hosted = Hosted(CONTENT, bytes_per_s=150_000)
    url = server.add("/song", hosted)
    impatient = TransferLimits(
        chunk_bytes=CHUNK,
        connections=3,
        reserve_bytes=0,
        slow_window_s=0.3,
        slow_bytes_per_s=200_000,
        backoff=Backoff(first_s=0.01, factor=1.0, cap_s=0.01, attempts=40),
    )

    await download(url, tmp_path, limits=impatient)

    assert the_file(tmp_path).read_bytes() == CONTENT
    assert len(server.log) > 11


async def test_tokens_go_to_the_hub_and_not_where_it_redirects(server: ModelServer, tmp_path: Path):
    with model_server() as storage:
        place = storage.add("/blob", Hosted(CONTENT))
        server.add("/owner/repo/resolve/main/a/song.safetensors", Hosted(b"", redirect_to=place))
        hub = SourceSettings(hub=server.base, hub_token="hf_secret", civitai_token="civ_secret")

        await download("hf://owner/repo/a/song.safetensors", tmp_path, settings=hub)

        assert the_file(tmp_path).read_bytes() == CONTENT
        assert {asked.headers.get("Authorization") for asked in server.log} == {"Bearer hf_secret"}
        assert {asked.headers.get("Authorization") for asked in storage.log} == {None}
        # The way is walked once, not for every chunk.
        assert len(server.log) == 1


def a_hub(server: ModelServer, place: str, content: bytes, *, sha256: str) -> SourceSettings:
    """HF_ENDPOINT at `server`, which says size and digest on the redirect to `place`, as the hub does."""
    linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha256}"', "ETag": '"the-commit"'}
    server.add("/owner/repo/resolve/v2/a/song.safetensors", Hosted(b"", redirect_to=place, redirect_headers=linked))
    return SourceSettings.from_environment({"HF_ENDPOINT": server.base + "/", "HF_TOKEN": "hf_secret"})


HUB_URL = "hf://owner/repo/a/song.safetensors@v2"


async def test_the_hubs_own_words_tell_size_and_digest_and_no_token_follows(server: ModelServer, tmp_path: Path):
    hosted = Hosted(CONTENT)
    with model_server() as storage:
        settings = a_hub(server, storage.add("/blob", hosted), CONTENT, sha256=hosted.sha256)

        async with a_downloader(settings) as downloader:
            assert await downloader.size(a_model(HUB_URL)) == len(CONTENT)
        await download(HUB_URL, tmp_path, settings=settings)

        assert the_file(tmp_path).read_bytes() == CONTENT
        assert {asked.headers.get("Authorization") for asked in server.log} == {"Bearer hf_secret"}
        assert {asked.headers.get("Authorization") for asked in storage.log} == {None}


async def test_a_file_that_is_not_what_the_hub_said_never_gets_its_name(server: ModelServer, tmp_path: Path):
    with model_server() as storage:
        settings = a_hub(server, storage.add("/blob", Hosted(CONTENT)), CONTENT, sha256="ab" * 32)

        with pytest.raises(ProvisionFailed, match=rf"SHA-256 is {Hosted(CONTENT).sha256}, not {'ab' * 32}"):
            await download(HUB_URL, tmp_path, settings=settings)

    assert not the_file(tmp_path).exists()


async def test_an_address_that_ran_out_is_looked_up_again(server: ModelServer, tmp_path: Path):
    with model_server() as storage:
        hosted = Hosted(CONTENT)
        place = storage.add("/blob", hosted)
        url = server.add("/song", Hosted(b"", redirect_to=place))
        hosted.refusals = []

        async with a_downloader() as downloader:
            remote = downloader._remote(__import__("comfyfleet.provision.sources", fromlist=["Source"]).Source(url=url))
            async with remote.open(0, 10) as answer:
                assert [block async for block in answer.blocks]
            hosted.refusals = [(403, {})]
            with pytest.raises(Exception, match="403"):
                async with remote.open(10, 20):
                    pass
            async with remote.open(10, 20) as answer:
                assert b"".join([block async for block in answer.blocks]) == CONTENT[10:20]


async def test_mirrors_are_asked_first_and_get_no_token(server: ModelServer, tmp_path: Path):
    with model_server() as mirror:
        mirror.add("/m/checkpoints/song.safetensors", Hosted(CONTENT))
        settings = SourceSettings(hub=server.base, hub_token="hf_secret", mirrors=(f"{mirror.base}/m",))

        await download("hf://owner/repo/song.safetensors", tmp_path, settings=settings)

        assert the_file(tmp_path).read_bytes() == CONTENT
        assert server.log == []
        assert all("Authorization" not in asked.headers for asked in mirror.log)


async def test_a_wrong_mirror_costs_time_not_the_file(server: ModelServer, tmp_path: Path):
    hosted = Hosted(CONTENT)
    with model_server() as mirror:
        mirror.add("/checkpoints/song.safetensors", Hosted(a_safetensors_file(len(CONTENT), seed=9)))
        url = server.add("/song", hosted)

        await download(url, tmp_path, settings=SourceSettings(mirrors=(mirror.base,)), sha256=hosted.sha256)

    assert the_file(tmp_path).read_bytes() == CONTENT


async def test_a_half_download_from_one_place_is_finished_from_another(server: ModelServer, tmp_path: Path):
    hosted = Hosted(CONTENT, refusals=[])
    url = server.add("/song", hosted)
    with model_server() as mirror:
        half = Hosted(CONTENT, etag='"other"')
        mirror.add("/checkpoints/song.safetensors", half)
        half.cut_after = [CHUNK] * 6 + [0] * 500

        await download(url, tmp_path, settings=SourceSettings(mirrors=(mirror.base,)), sha256=hosted.sha256)

        assert the_file(tmp_path).read_bytes() == CONTENT
        assert 0 < server.sent("/song") < len(CONTENT)


async def test_a_file_that_changes_meanwhile_is_never_mixed(server: ModelServer, tmp_path: Path):
    old, new = a_safetensors_file(len(CONTENT), seed=5), CONTENT
    url = server.add("/song", Hosted(old, etag='"old"', cut_after=[CHUNK] * 4 + [0] * 500))
    with pytest.raises(ProvisionFailed):
        await download(url, tmp_path)
    assert part_path(the_file(tmp_path)).exists()

    server.add("/song", Hosted(new, etag='"new"'))
    await download(url, tmp_path)

    assert the_file(tmp_path).read_bytes() == new


async def test_the_offline_folder_is_asked_instead_of_the_network(server: ModelServer, tmp_path: Path):
    offline = tmp_path / "stick"
    (offline / "checkpoints").mkdir(parents=True)
    (offline / "checkpoints" / "song.safetensors").write_bytes(CONTENT)
    url = server.add("/song", Hosted(CONTENT))
    settings = SourceSettings(offline_dir=offline)

    await download(url, tmp_path / "models", settings=settings, sha256=Hosted(CONTENT).sha256)
    assert the_file(tmp_path / "models").read_bytes() == CONTENT

    (offline / "checkpoints" / "song.safetensors").unlink()
    with pytest.raises(ProvisionFailed, match="not in the offline folder"):
        await download(url, tmp_path / "other", settings=settings)
    assert server.log == []


async def test_too_small_a_disk_is_said_with_figures_before_a_byte_is_written(server: ModelServer, tmp_path: Path):
    url = server.add("/song", Hosted(CONTENT))

    with pytest.raises(DiskFull, match="stay free") as refused:
        await download(url, tmp_path, limits=TransferLimits(chunk_bytes=CHUNK, reserve_bytes=10**18))

    assert refused.value.details["needed_bytes"] == len(CONTENT)
    assert refused.value.details["free_bytes"] > 0


async def test_what_is_there_is_not_fetched_again(server: ModelServer, tmp_path: Path):
    url = server.add("/song", Hosted(CONTENT))
    await download(url, tmp_path)
    asked = len(server.log)

    await download(url, tmp_path, size_bytes=len(CONTENT))

    assert len(server.log) == asked


async def test_two_processes_on_one_folder_fetch_a_file_once(server: ModelServer, tmp_path: Path):
    url = server.add("/song", Hosted(CONTENT, bytes_per_s=3_000_000))

    async with anyio.create_task_group() as both:
        both.start_soon(download, url, tmp_path)
        both.start_soon(download, url, tmp_path)

    assert the_file(tmp_path).read_bytes() == CONTENT
    assert server.sent("/song") == len(CONTENT)


@pytest.mark.slow
async def test_two_processes_of_their_own_put_one_download_on_the_wire(server: ModelServer, tmp_path: Path):
    url = server.add("/song", Hosted(CONTENT, bytes_per_s=400_000))
    program = Path(__file__).resolve().parents[1] / "support" / "download_process.py"
    words = [sys.executable, str(program), url, str(tmp_path), str(CHUNK), "2"]
    codes: list[int | None] = []

    async def one() -> None:
        done = await anyio.run_process(words, check=False)
        codes.append(done.returncode)
        assert done.returncode == 0, done.stderr

    async with anyio.create_task_group() as both:
        both.start_soon(one)
        both.start_soon(one)

    assert codes == [0, 0]
    assert the_file(tmp_path).read_bytes() == CONTENT
    assert server.sent("/song") == len(CONTENT)
    assert [path.name for path in the_file(tmp_path).parent.iterdir()] == ["song.safetensors"]
