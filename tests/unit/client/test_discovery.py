"""A client finds its control plane by argument, then environment, then the file of `comfyfleet up`."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfyfleet.client.discovery import find_control_plane
from comfyfleet.wire.errors import BadRequest, Unauthorized


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "comfyfleet"
    folder.mkdir()
    (folder / "client.toml").write_text('url = "http://from-file:8080/"\napi_key = "file-key"\n')
    return {"XDG_CONFIG_HOME": str(tmp_path)}


def test_argument_beats_environment_beats_file(home: dict[str, str]) -> None:
    assert find_control_plane(env=home).url == "http://from-file:8080"
    assert find_control_plane(env={**home, "COMFYFLEET_URL": "http://env"}).url == "http://env"
    assert find_control_plane(url="http://arg/", env={**home, "COMFYFLEET_URL": "http://env"}).url == "http://arg"


def test_the_documents_own_variable_name_for_the_key_works(home: dict[str, str]) -> None:
    assert find_control_plane(env={**home, "VAST_API_KEY": "vast"}).api_key == "vast"
    assert find_control_plane(env={**home, "VAST_API_KEY": "vast", "COMFYFLEET_API_KEY": "own"}).api_key == "own"


def test_what_is_missing_is_said_with_its_remedy(tmp_path: Path) -> None:
    nowhere = {"XDG_CONFIG_HOME": str(tmp_path)}

    with pytest.raises(BadRequest, match="comfyfleet up"):
        find_control_plane(env=nowhere)
    with pytest.raises(Unauthorized, match="COMFYFLEET_API_KEY"):
        find_control_plane(url="http://x", env=nowhere)
