"""Where a file may come from, and which token goes where."""

from __future__ import annotations

import pytest
import yarl

from comfyfleet.provision.sources import authorization, http_url, sources_of
from comfyfleet.provision.template import ModelFile
from comfyfleet.settings.provision import SourceSettings
from comfyfleet.wire.errors import BadRequest

HUB = "https://huggingface.co"
TOKENS = SourceSettings(hub_token="hf", civitai_token="civ")


def test_a_hub_address_has_owner_repository_path_and_revision():
    assert http_url("hf://o/r/a b/c.safetensors", HUB) == f"{HUB}/o/r/resolve/main/a%20b/c.safetensors"
    assert http_url("hf://o/r/c.ckpt@refs/pr/1", HUB) == f"{HUB}/o/r/resolve/refs%2Fpr%2F1/c.ckpt"
    assert http_url("https://x/y", HUB) == "https://x/y"
    with pytest.raises(BadRequest):
        http_url("hf://o/r", HUB)


@pytest.mark.parametrize(
    ("url", "token"),
    [
        ("https://huggingface.co/o/r/resolve/main/x", "hf"),
        ("https://civitai.com/api/download/models/1", "civ"),
        ("https://cdn-lfs.huggingface.co/x", None),
        ("https://huggingface.co.evil.example/x", None),
        ("http://huggingface.co/x", None),
        ("https://huggingface.co:8443/x", None),
        ("http://civitai.com/x", None),
        ("https://example.com/huggingface.co", None),
    ],
)
def test_a_token_goes_to_its_own_host_only(url, token):
    expected = {"Authorization": f"Bearer {token}"} if token else {}

    assert authorization(yarl.URL(url), TOKENS) == expected


def test_the_files_own_address_comes_last():
    model = ModelFile(url="hf://o/r/c.ckpt", folder="vae", name="c.ckpt")
    settings = SourceSettings(mirrors=("https://a", "https://b/m"))

    assert [source.url for source in sources_of(model, settings)] == [
        "https://a/vae/c.ckpt",
        "https://b/m/vae/c.ckpt",
        f"{HUB}/o/r/resolve/main/c.ckpt",
    ]


def test_settings_name_no_token_when_printed():
    assert "hf" not in repr(SourceSettings(hub="https://h", hub_token="hf_secret", civitai_token="hf_other"))


def test_a_proxy_serves_every_host_but_those_without():
    settings = SourceSettings.from_environment({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "mirror.local"})

    assert settings.proxy_for("https", "huggingface.co") == "http://proxy:3128"
    assert settings.proxy_for("https", "mirror.local") is None
    assert settings.proxy_for("http", "huggingface.co") is None
