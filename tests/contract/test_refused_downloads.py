"""What a source or a disk can do that no retry mends: the reason is told, and nothing gets the file's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfyfleet.wire.errors import ProvisionFailed
from support.downloads import CONTENT, download, the_file
from support.model_server import Hosted, ModelServer, model_server

pytestmark = pytest.mark.anyio


@pytest.fixture
def server():
    with model_server() as running:
        yield running


async def test_a_compressed_answer_is_no_part_of_a_file(server: ModelServer, tmp_path: Path):
    url = server.add("/song.safetensors", Hosted(content=CONTENT, encoding="gzip"))

    with pytest.raises(ProvisionFailed, match="answered compressed"):
        await download(url, tmp_path)

    assert not the_file(tmp_path).exists()


@pytest.mark.parametrize("has_ranges", [True, False])
async def test_an_empty_file_is_no_model(server: ModelServer, tmp_path: Path, has_ranges: bool):
    hosted = Hosted(content=b"", has_ranges=has_ranges)
    if has_ranges:
        hosted.refusals.append((416, {"Content-Range": "bytes */0"}))
    url = server.add("/song.safetensors", hosted)

    with pytest.raises(ProvisionFailed, match="empty"):
        await download(url, tmp_path)

    assert not the_file(tmp_path).exists()


async def test_a_folder_that_cannot_be_written_is_said_as_what_it_is(server: ModelServer, tmp_path: Path):
    url = server.add("/song.safetensors", Hosted(content=CONTENT))
    (tmp_path / "checkpoints").write_text("a file where the folder should be")

    with pytest.raises(ProvisionFailed, match=r"song\.safetensors cannot be written: ") as refused:
        await download(url, tmp_path)

    assert refused.value.details["reason"] == "disk"
