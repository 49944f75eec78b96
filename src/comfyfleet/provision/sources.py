"""Where one model file can be had, in the order to try, and which token goes to which host. Pure.

A token is chosen by the URL of each hop, so a redirect to another host never carries it. `HF_ENDPOINT` names the hub to
use, so the hub's token goes there and to huggingface.co; mirrors of `COMFYFLEET_MODEL_MIRRORS` get no token at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

import yarl

from comfyfleet.provision.template import ModelFile
from comfyfleet.settings.provision import SourceSettings
from comfyfleet.wire.errors import BadRequest

_CIVITAI_HOSTS = frozenset({"civitai.com", "www.civitai.com"})
_HUB_HOSTS = frozenset({"huggingface.co", "hf.co"})


@dataclass(frozen=True, kw_only=True)
class Source:
    """One URL of a file. is_mirror: a copy that the operator named, asked before the file's own address."""

    url: str
    is_mirror: bool = False


def sources_of(model: ModelFile, settings: SourceSettings) -> list[Source]:
    """Mirrors first, the file's own address last. Raises BadRequest for an `hf://` URL without owner, repo and path."""
    mirrors = [
        Source(url=f"{mirror}/{quote(model.folder)}/{quote(model.name)}", is_mirror=True) for mirror in settings.mirrors
    ]
    return [*mirrors, Source(url=http_url(model.url, settings.hub))]


def http_url(url: str, hub: str) -> str:
    """`hf://owner/repo/path[@revision]` as the hub's address (revision `main` unless given); others as they are."""
    if not url.startswith("hf://"):
        return url
    rest, _, revision = url.removeprefix("hf://").partition("@")
    owner, _, rest = rest.partition("/")
    repository, _, path = rest.partition("/")
    if not owner or not repository or not path:
        raise BadRequest(f"{url} must be hf://owner/repository/path[@revision]", field="url")
    return f"{hub}/{quote(owner)}/{quote(repository)}/resolve/{quote(revision or 'main', safe='')}/{quote(path)}"


def authorization(url: yarl.URL, settings: SourceSettings) -> dict[str, str]:
    """The header that this very URL may carry: a token for its own host, over TLS unless the hub named has none."""
    hub = yarl.URL(settings.hub)
    is_hub = url.origin() == hub.origin() or (_is_default_https(url) and url.host in _HUB_HOSTS)
    if is_hub and settings.hub_token:
        return {"Authorization": f"Bearer {settings.hub_token}"}
    if _is_default_https(url) and url.host in _CIVITAI_HOSTS and settings.civitai_token:
        return {"Authorization": f"Bearer {settings.civitai_token}"}
    return {}


def _is_default_https(url: yarl.URL) -> bool:
    return url.scheme == "https" and url.port == 443


def token_hint(url: yarl.URL, settings: SourceSettings) -> str:
    """What a user can do about a 401 or 403 of this host."""
    if url.host in _CIVITAI_HOSTS:
        return "CIVITAI_TOKEN lacks the right" if settings.civitai_token else "set CIVITAI_TOKEN"
    if url.host in _HUB_HOSTS or url.origin() == yarl.URL(settings.hub).origin():
        return (
            "HF_TOKEN lacks the right, or the model's terms are not accepted" if settings.hub_token else "set HF_TOKEN"
        )
    return "this host wants credentials"
