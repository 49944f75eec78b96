"""`python -m comfyfleet.engine.render SETTINGS_JSON`: the render process. Started by the engine's server only.

Two threads render, so that one prompt's decoding and saving pass beside the next one's sampling (the server says what
runs when). A third reads commands, so that a stop arrives while a node computes, and ends the process when the server
is gone. What anything prints goes to stderr: stdout belongs to the protocol.
"""

from __future__ import annotations

import gc
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import BinaryIO, NoReturn

import msgspec

from comfyfleet.engine.render.messages import (
    LENGTH_BYTES,
    CannotStart,
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
from comfyfleet.engine.render.machine import DeviceUnusable, devices, make_executor  # noqa: E402
from comfyfleet.ids import SystemIds  # noqa: E402


class Channel:
    """Frames in from stdin, frames out to the process's first stdout."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source = source
        self._sink = sink
        self._telling = threading.Lock()
        self.waiting: queue.SimpleQueue[Run] = queue.SimpleQueue()
        self.free: Callable[[Free], None] | None = None
        self.stopped: set[int] = set()

    def tell(self, report: Report) -> None:
        told = frame(report)
        with self._telling:
            self._sink.write(told)

    def read_commands(self) -> None:
        """For ever. When the server is gone there is nobody to render for: end at once, whatever is being computed."""
        while (command := self._read()) is not None:
            if isinstance(command, Stop):
                self.stopped.add(command.number)
            elif isinstance(command, Run):
                self.waiting.put(command)
            elif self.free is not None:
                self.free(command)
        os._exit(0)

    def _read(self) -> Command | None:
        head = self._source.read(LENGTH_BYTES)
        if len(head) < LENGTH_BYTES:
            return None
        length = int.from_bytes(head, "big")
        body = self._source.read(length)
        return decode_command(body) if len(body) == length else None


def serve(channel: Channel, executor: Executor, device: str) -> None:
    """Render what comes, for ever. Call on two threads; how much runs at a time is the server's to say."""
    torch.set_grad_enabled(False)  # a thread's own setting
    while True:
        command = channel.waiting.get()
        number = command.number
        job = Job(
            prompt_id=command.prompt_id,
            graph=command.graph,
            outputs=command.outputs,
            extra_pnginfo=command.extra_pnginfo,
            wants_previews=command.wants_previews,
        )
        outcome = executor.run(
            job,
            lambda event, told=number: channel.tell(Told(number=told, event=event)),  # type: ignore[misc]
            lambda wanted=number: wanted in channel.stopped,  # type: ignore[misc]
        )
        channel.stopped.discard(number)
        channel.tell(Done(number=number, outcome=outcome, devices=devices(device)))


def main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=RenderSettings)
    protocol_out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    channel = Channel(sys.stdin.buffer, protocol_out)
    threading.Thread(target=channel.read_commands, name="commands", daemon=True).start()
    clock = SystemClock()
    try:
        ensure_miniatures(settings.miniatures_dir)
        executor = make_executor(settings, settings.folders(clock, SystemIds()), clock)
    except DeviceUnusable as unusable:
        _end(channel, unusable.message)
    except Exception as error:
        traceback.print_exc()
        _end(channel, f"the render process cannot start: {type(error).__name__}: {error}")
    # What was loaded by now lives as long as the process: keep it out of every later collection, which would otherwise
    # walk torch's half a million objects and hold a prompt up for some tenths of a second.
    gc.collect()
    gc.freeze()
    channel.free = lambda asked: executor.free(unload_models=asked.unload_models, drop_results=asked.drop_results)
    threading.Thread(
        target=_serve_or_end, args=(channel, executor, settings.device), name="render", daemon=True
    ).start()
    declarations = executor.registry.declarations()
    channel.tell(
        Ready(declarations=declarations, devices=devices(settings.device), torch_version=str(torch.__version__))
    )
    serve(channel, executor, settings.device)


def _end(channel: Channel, reason: str) -> NoReturn:
    """At once: the thread that waits for commands would hold an ordinary exit up."""
    channel.tell(CannotStart(reason=reason))
    os._exit(1)


def _serve_or_end(channel: Channel, executor: Executor, device: str) -> None:
    """A bug that ends one of the threads ends the process: its server must not wait for a run nobody does."""
    try:
        serve(channel, executor, device)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
