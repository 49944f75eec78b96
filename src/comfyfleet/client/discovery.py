"""Find the control plane for a client, or say what to do."""

from __future__ import annotations

from collections.abc import Mapping

from comfyfleet.settings.client import ClientSettings, client_settings
from comfyfleet.wire.errors import BadRequest, Unauthorized


def find_control_plane(
    *, url: str | None = None, api_key: str | None = None, env: Mapping[str, str] | None = None
) -> ClientSettings:
    """Address and key, from argument, environment or client.toml; raises with the remedy when one is missing."""
    found = client_settings(url=url, api_key=api_key, env=env)
    if not found.url:
        raise BadRequest(
            "no control plane is known: run `comfyfleet up`, set COMFYFLEET_URL, or pass url=", reason="no_url"
        )
    if not found.api_key:
        raise Unauthorized("no API key is known: set COMFYFLEET_API_KEY or pass api_key=", reason="no_key")
    return found
