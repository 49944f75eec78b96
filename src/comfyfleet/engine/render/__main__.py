"""`python -m comfyfleet.engine.render SETTINGS_JSON`: the render process. Started by the engine's server only.

Two threads: this one renders; the other reads commands, so that a stop arrives while a node computes, and ends the
process when the server is gone. What anything prints goes to stderr: stdout belongs to the protocol.
"""

from __future__ import annotations

import gc
import os
import queue
import sys
import threading
from typing import BinaryIO

import msgspec

from comfyfleet.engine.render.messages import (
    LENGTH_BYTES,
    Command,
    Done,
    Free,
    Ready,
    Report,
    Run,
    Stop,
    Told,
    decode_command,
    frame,
)
from comfyfleet.engine.render.setup import RenderSettings, keep_freed_memory

keep_freed_memory()  # before torch allocates anything

import torch  # noqa: E402

from comfyfleet.clock import SystemClock  # noqa: E402
from comfyfleet.engine.executor import Executor, Job  # noqa: E402
from comfyfleet.engine.miniatures import ensure as ensure_miniatures  # noqa: E402
from comfyfleet.engine.render.machine import devices, make_executor  # noqa: E402
from comfyfleet.ids import SystemIds  # noqa: E402


class Channel:
    """Frames in from stdin, frames out to the process's first stdout."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source = source
        self._sink = sink
        self.waiting: queue.SimpleQueue[Run | Free] = queue.SimpleQueue()
        self.stopped: set[str] = set()

    def tell(self, report: Report) -> None:
        self._sink.write(frame(report))

    def read_commands(self) -> None:
        """For ever. When the server is gone there is nobody to render for: end at once, whatever is being computed."""
        while (command := self._read()) is not None:
            if isinstance(command, Stop):
                self.stopped.add(command.prompt_id)
            else:
                self.waiting.put(command)
        os._exit(0)

    def _read(self) -> Command | None:
        head = self._source.read(LENGTH_BYTES)
        if len(head) < LENGTH_BYTES:
            return None
        length = int.from_bytes(head, "big")
        body = self._source.read(length)
        return decode_command(body) if len(body) == length else None


def serve(channel: Channel, executor: Executor, device: str) -> None:
    """Render what comes, one at a time, for ever."""
    declarations = executor.registry.declarations()
    channel.tell(Ready(declarations=declarations, devices=devices(device), torch_version=str(torch.__version__)))
    while True:
        command = channel.waiting.get()
        if isinstance(command, Free):
            executor.free(unload_models=command.unload_models, drop_results=command.drop_results)
            continue
        prompt_id = command.prompt_id
        job = Job(
            prompt_id=prompt_id,
            graph=command.graph,
            outputs=command.outputs,
            extra_pnginfo=command.extra_pnginfo,
            wants_previews=command.wants_previews,
        )
        outcome = executor.run(
            job,
            lambda event, told=prompt_id: channel.tell(Told(prompt_id=told, event=event)),  # type: ignore[misc]
            lambda wanted=prompt_id: wanted in channel.stopped,  # type: ignore[misc]
        )
        channel.stopped.discard(prompt_id)
        channel.tell(Done(prompt_id=prompt_id, outcome=outcome, devices=devices(device)))


def main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=RenderSettings)
    protocol_out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    channel = Channel(sys.stdin.buffer, protocol_out)
    threading.Thread(target=channel.read_commands, name="commands", daemon=True).start()
    ensure_miniatures(settings.miniatures_dir)
    clock = SystemClock()
    executor = make_executor(settings, settings.folders(clock, SystemIds()), clock)
    # What was loaded by now lives as long as the process: keep it out of every later collection, which would otherwise
    # walk torch's half a million objects and hold a prompt up for some tenths of a second.
    gc.collect()
    gc.freeze()
    serve(channel, executor, settings.device)


if __name__ == "__main__":
    main()
