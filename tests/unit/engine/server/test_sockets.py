"""Each client has its own outbox: who reads slowly loses previews first, then old states, then the connection."""

from __future__ import annotations

import json
import struct

import pytest

from comfyfleet.engine import events
from comfyfleet.engine.server.prompts import PromptRecord, QueuedPrompt
from comfyfleet.engine.server.sockets import Hub, Outbox
from comfyfleet.engine.server.telling import Teller

pytestmark = pytest.mark.anyio


async def read(outbox: Outbox, count: int) -> list:
    return [await outbox.take() for _ in range(count)]


async def test_frames_come_out_in_the_order_they_went_in() -> None:
    outbox = Outbox()
    for number in range(3):
        outbox.put("status", str(number))

    assert await read(outbox, 3) == ["0", "1", "2"]


async def test_an_outbox_that_grows_too_large_keeps_what_is_not_repeated() -> None:
    outbox = Outbox(limit_bytes=100)
    outbox.put("execution_start", "start")
    outbox.put("preview", b"p" * 40)
    outbox.put("progress_state", "old" * 10)
    outbox.put("progress_state", "new" * 10)

    assert await read(outbox, 2) == ["start", "new" * 10]


async def test_a_client_that_never_reads_is_told_to_close() -> None:
    outbox = Outbox(limit_bytes=100)
    for _ in range(30):
        outbox.put("executed", "x" * 10)

    assert outbox.is_overrun
    assert await outbox.take() is None


async def test_the_newer_socket_of_an_id_stays_when_the_older_one_leaves() -> None:
    hub = Hub()
    older, newer = Outbox(), Outbox()
    hub.join("a", older)
    hub.join("a", newer)

    hub.leave("a", older)
    hub.send("status", {}, "a")

    assert json.loads(await newer.take())["type"] == "status"
    assert hub.is_listening("a")


async def test_a_picture_goes_out_with_metadata_only_to_those_who_read_it() -> None:
    hub = Hub()
    plain, modern = Outbox(), Outbox()
    modern.features = {"supports_preview_metadata": True}
    hub.join("plain", plain)
    hub.join("modern", modern)

    hub.send_preview(b"picture", "image/png", {"node_id": "3"}, None)

    assert await plain.take() == struct.pack(">II", 1, 2) + b"picture"
    frame = await modern.take()
    kind, length = struct.unpack(">II", frame[:8])
    assert (kind, frame[8 + length :]) == (4, b"picture")
    assert json.loads(frame[8 : 8 + length]) == {"node_id": "3", "image_type": "image/png"}


def teller_for(hub: Hub, client_id: str | None) -> tuple[Teller, PromptRecord]:
    extra = {"client_id": client_id} if client_id is not None else {}
    record = PromptRecord(item=QueuedPrompt(number=0, prompt_id='p"1', prompt={}, extra_data=extra, outputs=[]))
    return Teller(hub, record), record


async def test_the_state_of_all_nodes_is_valid_json_whatever_their_names_are() -> None:
    hub, outbox = Hub(), Outbox()
    hub.join("a", outbox)
    teller, _ = teller_for(hub, "a")

    teller.tell(events.NodeStarted(node='we"ird\\'))
    teller.tell(events.NodeProgress(node='we"ird\\', value=1, maximum=4))
    teller.tell(events.NodeFinished(node='we"ird\\'))

    told = [json.loads(frame) for frame in await read(outbox, 5)]
    assert [message["type"] for message in told] == [
        "progress_state", "executing", "progress_state", "progress", "progress_state",
    ]  # fmt: skip
    states = [m["data"]["nodes"]['we"ird\\'] for m in told if m["type"] == "progress_state"]
    assert [(state["value"], state["max"], state["state"]) for state in states] == [
        (0.0, 1.0, "running"),
        (1, 4, "running"),
        (4, 4, "finished"),
    ]


async def test_a_prompt_of_nobody_is_interrupted_for_everybody_to_hear() -> None:
    hub, outbox = Hub(), Outbox()
    hub.join("somebody", outbox)
    teller, record = teller_for(hub, None)

    teller.tell(events.RunStarted(timestamp_ms=1))
    teller.tell(events.RunInterrupted(node_id="1", node_type="X", executed=[], timestamp_ms=2))

    assert json.loads(await outbox.take())["type"] == "execution_interrupted"
    assert [kind for kind, _ in record.messages] == ["execution_start", "execution_interrupted"]
