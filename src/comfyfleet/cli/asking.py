"""What the commands that talk to a control plane share: find it, ask it, print a table or JSON. No command itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import wraps
from typing import Any, TypeVar

import anyio
import click
import msgspec

from comfyfleet.client.discovery import find_control_plane
from comfyfleet.client.stream import TransportFailure
from comfyfleet.client.transport import Transport, control_plane_error
from comfyfleet.wire.errors import BadRequest, Unauthorized, Unavailable

Command = TypeVar("Command", bound=Callable[..., Any])


class Asking:
    """A control plane to ask: one call, one connection; a command makes few."""

    def __init__(self, url: str | None, api_key: str | None, *, is_raw: bool) -> None:
        self._found = find_control_plane(url=url, api_key=api_key)
        if not (self._found.api_key.isascii() and self._found.api_key.isprintable()):
            raise Unauthorized("the API key is not one line of printable ASCII", reason="bad_key")
        self.is_raw = is_raw

    def __call__(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer's JSON. Raises the FleetError that the control plane raised, or Unavailable."""
        try:
            return anyio.run(self._ask, method, path, body)
        except UnicodeEncodeError as error:
            raise BadRequest(f"an argument is not UTF-8 text: {error.object!r}") from error

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        transport = Transport(connection_limit=2, ca_url=f"{self._found.url}/static/jvastai_root.cer")
        await transport.open()
        try:
            answer = await transport.call(
                method,
                self._found.url + path,
                key=self._found.api_key,
                json=None if body is None else dict(body),
                timeout_s=60.0,
            )
        except TransportFailure as error:
            raise Unavailable(f"the control plane at {self._found.url} does not answer: {error}") from error
        finally:
            await transport.close()
        if not 200 <= answer.status < 300:
            raise control_plane_error(answer)
        return answer.body


def asking(command: Command) -> Command:
    """Give a command its control plane as first argument, and the options that name one."""

    @click.option("--url", help="The control plane; else COMFYFLEET_URL, else client.toml.")
    @click.option("--api-key", help="A key; else COMFYFLEET_API_KEY or VAST_API_KEY, else client.toml.")
    @click.option("--raw", is_flag=True, help="Print JSON as it came.")
    @wraps(command)
    def run(url: str | None, api_key: str | None, raw: bool, **arguments: Any) -> Any:
        return command(Asking(url, api_key, is_raw=raw), **arguments)

    return run  # type: ignore[return-value]  # click's options keep the call's shape, which no type can say


def show_table(rows: Iterable[Mapping[str, Any]], columns: tuple[str, ...]) -> None:
    """Columns as wide as their widest value; nothing where there is nothing."""
    texts = [[_text(name, row.get(name)) for name in columns] for row in rows]
    widths = [
        max(len(name), *(len(line[place]) for line in texts)) if texts else len(name)
        for place, name in enumerate(columns)
    ]
    for line in [list(columns), *texts]:
        click.echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def printable(text: str) -> str:
    """Text as one line for a terminal: what others stored may hold characters that command it, or turn lines about."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def show(value: Any) -> None:
    """JSON, indented."""
    click.echo(msgspec.json.format(msgspec.json.encode(value)).decode())


def _text(name: str, value: Any) -> str:
    if value is None or value == "":
        return "-"
    if (name == "at" or name.endswith("_at")) and isinstance(value, int | float):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, list | tuple):
        return printable(",".join(str(item) for item in value)) or "all"
    return f"{value:g}" if isinstance(value, float) else printable(str(value))
