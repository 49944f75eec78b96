"""One client for every engine, embedded or a real ComfyUI: HTTP to ask, one socket for hints.

The socket is never believed alone: events may be lost (no replay on reconnect, one slow receiver stalls all), so
whoever follows a prompt also asks the history now and then. Every connection has a new client id, because ComfyUI
unregisters the newer of two sockets with one id when the older closes. Faults of transport surface as EngineGone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import msgspec
import structlog

from comfyfleet.clock import Clock
from comfyfleet.ids import Ids
from comfyfleet.wire.errors import WorkflowRefused
from comfyfleet.wire.workflow import Graph, links
from comfyfleet.worker.engines.line import Line, LineBroken
from comfyfleet.worker.engines.refusals import BROKEN_LINK_TYPES, refusal, with_broken_link, with_nearest

log = structlog.get_logger()

_encode = msgspec.json.Encoder().encode
_RECONNECT_FIRST_S, _RECONNECT_CAP_S = 0.05, 0.5
# An idle ComfyUI sends nothing, not even pings: ours find a dead peer.
_HEARTBEAT_S = 20.0
_CHUNK_BYTES = 256 * 1024


class EngineGone(Exception):
    """The engine did not answer, or not with anything we know."""


class EventData(msgspec.Struct, frozen=True, kw_only=True):
    """What we read of an event's data; `output` and the rest stay in the history."""

    prompt_id: str | None = None
    node: str | None = None
    value: float | None = None
    max: float | None = None


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """A small picture of a render on its way."""

    mime: str
    data: bytes


class EngineEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One JSON frame of the socket."""

    type: str
    data: EventData = EventData()


class HistoryEntry(msgspec.Struct, kw_only=True):
    """A finished prompt, the engine's words kept: `{prompt, outputs, status, meta}` are ComfyUI's."""

    prompt: list[Any] = []
    outputs: dict[str, dict[str, Any]] = {}
    status: dict[str, Any] = {}
    meta: dict[str, Any] = {}

    def message(self, kind: str) -> dict[str, Any] | None:
        """The data of the last status message of this kind, or None."""
        found = [message[1] for message in self.status.get("messages", []) if message[0] == kind]
        return found[-1] if found else None


class Accepted(msgspec.Struct, kw_only=True):
    """The engine's 200 to POST /prompt."""

    prompt_id: str
    node_errors: dict[str, Any] = {}


class QueueView(msgspec.Struct, frozen=True, kw_only=True):
    """Prompt ids in the engine's hands."""

    running: tuple[str, ...]
    pending: tuple[str, ...]

    def __contains__(self, prompt_id: object) -> bool:
        return prompt_id in self.running or prompt_id in self.pending


_event_decoder = msgspec.json.Decoder(EngineEvent)
_history_decoder = msgspec.json.Decoder(dict[str, HistoryEntry])
_accepted_decoder = msgspec.json.Decoder(Accepted)

Listener = Callable[[EngineEvent | Preview], None]


class EngineClient:
    """`run` keeps the socket; the other methods may be called by anyone at any time."""

    def __init__(self, base_url: str, *, session: aiohttp.ClientSession, clock: Clock, ids: Ids) -> None:
        self.base_url = base_url
        self._session = session
        self._line = Line(base_url) if Line.reaches(base_url) else None
        self._clock = clock
        self._ids = ids
        self._listeners: dict[str, Listener] = {}
        self.client_id = self._new_client_id()
        self.connected = anyio.Event()
        self.last_heard = clock.monotonic()

    def listen(self, prompt_id: str, listener: Listener) -> None:
        """Hand this prompt's events to `listener`; register before submitting, so that none is missed."""
        self._listeners[prompt_id] = listener

    def forget(self, prompt_id: str) -> None:
        self._listeners.pop(prompt_id, None)

    async def run(self) -> None:
        """Keep one socket open for as long as the client lives."""
        try:
            await self._keep_socket()
        finally:
            if self._line is not None:
                self._line.close()

    async def _keep_socket(self) -> None:
        wait_s = _RECONNECT_FIRST_S
        while True:
            try:
                self.client_id = self._new_client_id()
                url = f"{self.base_url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}"
                async with self._session.ws_connect(url, max_msg_size=0, heartbeat=_HEARTBEAT_S, compress=0) as socket:
                    wait_s = _RECONNECT_FIRST_S
                    await self._read(socket)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                log.debug("engine.socket_failed", engine=self.base_url, error=str(error))
            if self.connected.is_set():
                self.connected = anyio.Event()
            await self._clock.sleep(wait_s)
            wait_s = min(wait_s * 2, _RECONNECT_CAP_S)

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        await socket.send_str(_FEATURES)
        speaker = ""  # the prompt of the last progress: pictures of an older ComfyUI name none
        async for message in socket:
            self.last_heard = self._clock.monotonic()
            if message.type is aiohttp.WSMsgType.BINARY:
                self._hear_picture(message.data, speaker)
                continue
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            # The first frame is a status: only after it is this id known to the engine.
            if not self.connected.is_set():
                self.connected.set()
            try:
                event = _event_decoder.decode(message.data)
            except msgspec.MsgspecError:
                continue  # an event of a custom node, in a shape of its own
            if event.type == "progress":
                speaker = event.data.prompt_id or ""
            listener = self._listeners.get(event.data.prompt_id or "")
            if listener is not None:
                listener(event)

    def _hear_picture(self, frame: bytes, speaker: str) -> None:
        found = read_picture(frame)
        if found is None:
            return
        prompt_id, preview = found
        listener = self._listeners.get(prompt_id or speaker)
        if listener is not None:
            listener(preview)

    async def until_connected(self, limit_s: float) -> None:
        """Wait for the socket, but not for ever: without it a job loses its progress, not its end."""
        if not self.connected.is_set():
            with anyio.move_on_after(limit_s):
                await self.connected.wait()

    async def submit(self, graph: Graph, prompt_id: str, *, extra_pnginfo: dict[str, Any] | None = None) -> None:
        """POST /prompt. Raises WorkflowRefused with the engine's reasons, or EngineGone when it may not have it."""
        body: dict[str, Any] = {"prompt": graph, "prompt_id": prompt_id, "client_id": self.client_id}
        if extra_pnginfo:
            body["extra_data"] = {"extra_pnginfo": extra_pnginfo}
        status, answer = await self._call("POST", "/prompt", body)
        if status == 200:
            accepted = _accepted_decoder.decode(answer)
            if accepted.node_errors:
                # Some outputs were dropped, the rest would run: all or nothing.
                await self.delete(prompt_id)
                await self.interrupt(prompt_id)
                raise await self._refusal({"node_errors": accepted.node_errors}, graph)
            return
        if status == 400:
            raise await self._refusal(msgspec.json.decode(answer), graph)
        if status == 413:
            raise WorkflowRefused("the workflow is larger than the engine accepts", field="workflow_json")
        # A 500 proves nothing: ComfyUI queues some prompts that it answers so.
        if prompt_id in await self.queue() or await self.history(prompt_id) is not None:
            return
        raise EngineGone(f"POST /prompt answered {status}")

    async def history(self, prompt_id: str) -> HistoryEntry | None:
        """The finished prompt's entry, or None, which by itself tells nothing."""
        _, answer = await self._call("GET", f"/history/{prompt_id}")
        try:
            return _history_decoder.decode(answer).get(prompt_id)
        except msgspec.MsgspecError as error:
            raise EngineGone(f"unreadable history: {error}") from error

    async def queue(self) -> QueueView:
        _, answer = await self._call("GET", "/queue")
        try:
            body = msgspec.json.decode(answer)
            return QueueView(
                running=tuple(str(item[1]) for item in body["queue_running"]),
                pending=tuple(str(item[1]) for item in body["queue_pending"]),
            )
        except (msgspec.MsgspecError, KeyError, TypeError, IndexError) as error:
            raise EngineGone(f"unreadable queue: {error}") from error

    async def delete(self, prompt_id: str) -> None:
        """Take a pending prompt out of the queue; a running or unknown one is left alone."""
        await self._call("POST", "/queue", {"delete": [prompt_id]})

    async def interrupt(self, prompt_id: str) -> None:
        """Stop this prompt if it is the one that runs."""
        await self._call("POST", "/interrupt", {"prompt_id": prompt_id})

    async def free(self) -> None:
        """Drop models and cached results as soon as the engine is between prompts."""
        await self._call("POST", "/free", {"unload_models": True, "free_memory": True})

    async def system_stats(self) -> dict[str, Any]:
        _, answer = await self._call("GET", "/system_stats")
        stats = msgspec.json.decode(answer)
        return stats if isinstance(stats, dict) else {}

    async def object_info(self, class_type: str = "") -> dict[str, Any]:
        _, answer = await self._call("GET", f"/object_info/{class_type}" if class_type else "/object_info")
        info = msgspec.json.decode(answer)
        return info if isinstance(info, dict) else {}

    async def view(self, query: dict[str, str], target: Path) -> bool:
        """Stream a file of the engine to `target`; False when it is not there. Raises EngineGone."""
        try:
            async with self._session.get(f"{self.base_url}/view", params=query) as answer:
                if answer.status != 200:
                    return False
                await anyio.Path(target.parent).mkdir(parents=True, exist_ok=True)
                async with await anyio.open_file(target, "wb") as file:
                    async for chunk in answer.content.iter_chunked(_CHUNK_BYTES):
                        await file.write(chunk)
                return True
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EngineGone(f"GET /view: {error}") from error

    async def upload_input(self, path: Path, name: str) -> None:
        """Put a file into the engine's input folder under `name` (`sub/folder/file`). Raises EngineGone."""
        subfolder, _, filename = name.rpartition("/")
        form = aiohttp.FormData({"subfolder": subfolder, "type": "input", "overwrite": "true"})
        try:
            with path.open("rb") as file:
                form.add_field("image", file, filename=filename)
                async with self._session.post(f"{self.base_url}/upload/image", data=form) as answer:
                    if answer.status != 200:
                        raise EngineGone(f"POST /upload/image answered {answer.status}")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EngineGone(f"POST /upload/image: {error}") from error

    async def _refusal(self, answer: dict[str, Any], graph: Graph) -> WorkflowRefused:
        """The refusal, and what only a look at the nodes can add: the nearest name, the link that leads nowhere."""
        error = refusal(answer, graph)
        kind, node_id = error.details.get("type"), str(error.details.get("node_id"))
        try:
            if kind == "value_not_in_list" and "nearest" not in error.details:
                class_type, name = str(error.details.get("class_type")), str(error.details.get("input"))
                inputs = (await self.object_info(class_type)).get(class_type, {}).get("input", {})
                return with_nearest(error, {**inputs.get("optional", {}), **inputs.get("required", {})}.get(name))
            if kind in BROKEN_LINK_TYPES and node_id in graph:
                sources = {graph[source]["class_type"] for _, source, _ in links(graph[node_id]) if source in graph}
                infos = {name: (await self.object_info(name)).get(name, {}) for name in sorted(sources)}
                outputs = {name: len(info["output"]) for name, info in infos.items() if "output" in info}
                return with_broken_link(error, graph, outputs)
        except (EngineGone, msgspec.MsgspecError):
            return error
        return error

    async def _call(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        data = None if body is None else _encode(body)
        try:
            if self._line is not None:
                status, found = await self._line.call(method, path, data)
                if not 300 <= status < 400:
                    return status, found
            async with self._session.request(method, self.base_url + path, data=data, headers=_JSON) as answer:
                return answer.status, await answer.read()
        except (aiohttp.ClientError, LineBroken, OSError, TimeoutError) as error:
            raise EngineGone(f"{method} {path}: {str(error) or type(error).__name__}") from error

    def _new_client_id(self) -> str:
        return f"comfyfleet_{self._ids.request_id()}"


_FEATURES = _encode({"type": "feature_flags", "data": {"supports_preview_metadata": True}}).decode()
_PICTURE, _PICTURE_WITH_METADATA = 1, 4
_MIMES = {1: "image/jpeg", 2: "image/png"}


def read_picture(frame: bytes) -> tuple[str, Preview] | None:
    """(prompt id or "", picture) of a binary frame, or None. Layout: two big-endian numbers, then data."""
    if len(frame) < 8:
        return None
    event, second = int.from_bytes(frame[:4], "big"), int.from_bytes(frame[4:8], "big")
    if event == _PICTURE:
        return "", Preview(mime=_MIMES.get(second, "image/jpeg"), data=frame[8:])
    if event == _PICTURE_WITH_METADATA:
        try:
            told = msgspec.json.decode(frame[8 : 8 + second])
            return str(told["prompt_id"]), Preview(mime=str(told["image_type"]), data=frame[8 + second :])
        except (msgspec.MsgspecError, KeyError, TypeError):
            return None
    return None


_JSON = {"Content-Type": "application/json"}


async def wait_until_answering(client: EngineClient, clock: Clock, *, poll_s: float = 0.1) -> None:
    """Return at the engine's first answer to /system_stats."""
    while True:
        try:
            with anyio.fail_after(5):
                await client.system_stats()
                return
        except (EngineGone, TimeoutError, msgspec.MsgspecError):
            await clock.sleep(poll_s)
