"""The fake engine's queue and its one worker thread: what happens to a prompt after `POST /prompt` said 200.

A real thread, so that its death is real: the HTTP side lives on, as ComfyUI's does. It keeps ComfyUI's order of
events: `execution_success` goes out before the history entry is stored, `executing: null` after it.
"""

from __future__ import annotations

import glob
import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from comfyfleet.clock import Clock
from comfyfleet.testing.fake_nodes import NODES, literals, png, sample_media
from comfyfleet.wire.workflow import is_link

Emit = Callable[[str, dict[str, Any], str | None], None]
Item = tuple[float, str, dict[str, Any], dict[str, Any], list[str]]


class _Interrupted(Exception):
    """The run was stopped."""


_LONGEST_STEM = 240  # of a file's name: with a counter and an ending, what a file system takes


class _NodeFault(Exception):
    """A node raised; kind is the dotted exception type that ComfyUI reports."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


_SCALING_S = 0.15

OOM = _NodeFault("torch.OutOfMemoryError", "Allocation on device \nThis error means you ran out of memory on your GPU.")
DEVICE_ASSERT = _NodeFault("torch.AcceleratorError", "CUDA error: device-side assert triggered")


class FakeWorker(threading.Thread):
    """Runs prompts one at a time. `faults` maps a fault's name to how many prompts it still strikes."""

    def __init__(
        self, *, emit: Emit, clock: Clock, folders: Mapping[str, Path], job_s: float, ledger: Path | None
    ) -> None:
        super().__init__(name="prompt_worker", daemon=True)
        self._emit = emit
        self._clock = clock
        self._folders = folders
        self._job_s = job_s
        self._ledger = ledger
        self._cache: dict[Any, dict[str, Any]] = {}
        self._counters: dict[str, int] = {}
        self._poisoned = False
        self._stop_now = threading.Event()
        self._free: bool = False
        self.node: str | None = None
        self.changed = threading.Condition()
        self.pending: list[Item] = []
        self.running: Item | None = None
        self.history: dict[str, dict[str, Any]] = {}
        self.renders: dict[str, int] = {}
        self.faults: dict[str, int] = {}
        self.history_late_s = 0.0

    def put(self, item: Item) -> None:
        """Queue by number, ties by prompt id, as ComfyUI's heap does."""
        with self.changed:
            self.pending.append(item)
            self.pending.sort(key=lambda waiting: (waiting[0], waiting[1]))
            self.changed.notify()
        self.tell_queue()

    def delete(self, prompt_ids: list[str]) -> None:
        with self.changed:
            self.pending = [item for item in self.pending if item[1] not in prompt_ids]
        self.tell_queue()

    def interrupt(self, prompt_id: str | None) -> None:
        running = self.running
        if running is not None and (prompt_id is None or running[1] == prompt_id):
            self._stop_now.set()

    def free(self) -> None:
        with self.changed:
            self._free = True
            self.changed.notify()

    def tell_queue(self) -> None:
        remaining = len(self.pending) + (self.running is not None)
        self._emit("status", {"status": {"exec_info": {"queue_remaining": remaining}}}, None)

    def run(self) -> None:
        self._mark("life", "begins")
        while True:
            with self.changed:
                while not self.pending and not self._free:
                    self.changed.wait()
                item = self.pending.pop(0) if self.pending else None
                self.running, self.node = item, None
                if self._free:
                    self._free = False
                    self._cache.clear()
            if item is not None:
                self._run_prompt(item)

    def _run_prompt(self, item: Item) -> None:
        _, prompt_id, prompt, extra, outputs = item
        client = extra.get("client_id")  # null extra_data kills this thread, as it does ComfyUI's
        self._stop_now.clear()
        self._mark("start", prompt_id)
        self.renders[prompt_id] = self.renders.get(prompt_id, 0) + 1
        messages: list[list[Any]] = []

        def tell(kind: str, data: dict[str, Any], *, keep: bool = False) -> None:
            data = {"prompt_id": prompt_id, **data}
            if keep:
                data["timestamp"] = int(self._clock.now() * 1000)
                messages.append([kind, data])
            self._emit(kind, data, client)

        self.tell_queue()
        tell("execution_start", {}, keep=True)
        # Every node is looked at, needed or not: one without inputs ends the thread here.
        keys = {node_id: _signature(prompt, node_id) for node_id in prompt}
        cached = [node_id for node_id, key in keys.items() if key in self._cache]
        tell("execution_cached", {"nodes": cached}, keep=True)
        shown: dict[str, Any] = {}
        states: dict[str, dict[str, Any]] = {}
        executed: list[str] = []

        def tell_state(node_id: str, value: float, maximum: float, state: str) -> None:
            states[node_id] = {
                "value": value,
                "max": maximum,
                "state": state,
                "node_id": node_id,
                "prompt_id": prompt_id,
                "display_node_id": node_id,
                "parent_node_id": None,
                "real_node_id": node_id,
            }
            tell("progress_state", {"nodes": states})

        current = ""
        failure: tuple[str, dict[str, Any]] | None = None
        order = _order(prompt, outputs)
        fresh = [node_id for node_id in order if node_id not in cached]
        try:
            for node_id in order:
                current = node_id
                if node_id in cached:
                    ui = self._cache[keys[node_id]]
                    if ui:
                        tell("executed", {"node": node_id, "display_node": node_id, "output": ui})
                        tell_state(node_id, 1.0, 1.0, "finished")
                else:
                    self.node = node_id
                    tell_state(node_id, 0.0, 1.0, "running")
                    tell("executing", {"node": node_id, "display_node": node_id})
                    ui = self._run_node(prompt, node_id, self._job_s / max(1, len(fresh)), tell)
                    executed.append(node_id)
                    if ui:
                        tell("executed", {"node": node_id, "display_node": node_id, "output": ui})
                    tell_state(node_id, 1.0, 1.0, "finished")
                    self._cache[keys[node_id]] = ui
                if ui:
                    shown[node_id] = ui
        except _Interrupted:
            failure = ("execution_interrupted", {})
        except _NodeFault as fault:
            facts = {
                "exception_message": f"{fault}\n",
                "exception_type": fault.kind,
                "traceback": [f'  File "{__file__}", line 1, in execute\n'],
                "current_inputs": {name: [str(value)] for name, value in literals(prompt[current]).items()},
                "current_outputs": list(shown),
            }
            failure = ("execution_error", facts)
        self._cache = {key: value for key, value in self._cache.items() if key in set(keys.values())}
        if failure is None:
            tell("execution_success", {}, keep=True)
        else:
            kind, facts = failure
            about = {"node_id": current, "node_type": prompt[current]["class_type"], "executed": executed}
            tell(kind, {**about, **facts}, keep=True)
        self._mark("done", prompt_id)
        if self.history_late_s:
            threading.Event().wait(self.history_late_s)
        entry = {
            "prompt": [item[0], prompt_id, prompt, _without_keys(extra), outputs],
            "outputs": shown,
            "status": {
                "status_str": "success" if failure is None else "error",
                "completed": failure is None,
                "messages": messages,
            },
            "meta": {
                node_id: {
                    "node_id": node_id,
                    "display_node": node_id,
                    "parent_node": None,
                    "real_node_id": node_id,
                }
                for node_id in shown
            },
        }
        with self.changed:
            self.history[prompt_id] = entry
            while len(self.history) > 10_000:
                self.history.pop(next(iter(self.history)))
            self.running = None
        self.tell_queue()
        self._emit("executing", {"node": None, "prompt_id": prompt_id}, client)

    def _run_node(self, prompt: dict[str, Any], node_id: str, work_s: float, tell: Any) -> dict[str, Any]:
        node = prompt[node_id]
        name, values = node["class_type"], literals(node)
        if self._poisoned:
            raise DEVICE_ASSERT
        for fault in ("oom", "device_assert", "worker_dies", "killed"):
            if self.faults.get(fault):
                self.faults[fault] -= 1
                self._strike(fault)
        if name == "FakeFault":
            self._strike(str(values["fault"]))
        elif name == "ImageScale":
            self._work(_SCALING_S)
        elif name in ("LoadImage", "FakePicker"):
            self._load(str(values.get("image") or values.get("choice")))
        elif name == "FakeSleep":
            self._work(float(values["seconds"]))
        elif name == "FakeGate":
            self._wait_at(str(values["gate"]))
        elif name == "FakeDeaf":  # one long call into a library: no interrupt is heard before it returns
            self._wait_at(str(values["gate"]), is_deaf=True)
        elif name.startswith("KSampler"):
            steps = int(values["steps"])
            for step in range(1, steps + 1):
                self._work(work_s / steps)
                tell("progress", {"value": step, "max": steps, "node": node_id})
        else:
            self._work(work_s)
        saves = NODES[name].saves
        try:
            return self._save(saves, values, prompt, node_id) if saves else {}
        except (OSError, ValueError) as problem:  # a name that no file can have
            raise _NodeFault(type(problem).__name__, str(problem)) from problem

    def _load(self, name: str) -> None:
        path = self._folders["input"] / name
        if path.is_file() and not path.read_bytes().startswith(b"\x89PNG"):
            raise _NodeFault("PIL.UnidentifiedImageError", f"cannot identify image file '{path}'")

    def _work(self, seconds: float) -> None:
        if self._stop_now.wait(seconds):
            raise _Interrupted

    def _wait_at(self, gate: str, *, is_deaf: bool = False) -> None:
        """Until somebody makes the file `gate-<name>` beside the ledger: a run that lasts as long as a test wants."""
        if self._ledger is None:
            raise _NodeFault("ValueError", "a gate lies beside the ledger, and there is none")
        self._ledger.with_name(f"at-{gate}").touch()  # it got here
        while not self._ledger.with_name(f"gate-{gate}").exists():
            threading.Event().wait(0.01) if is_deaf else self._work(0.01)

    def _strike(self, fault: str) -> None:
        if fault == "oom":
            raise OOM
        if fault == "device_assert":
            self._poisoned = True
            raise DEVICE_ASSERT
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "worker_dies":
            raise SystemError("the worker thread dies here")
        if fault == "error":
            raise _NodeFault("ValueError", "this node always fails")

    def _save(
        self, saves: tuple[str, str, str], values: dict[str, Any], prompt: dict[str, Any], node_id: str
    ) -> dict[str, Any]:
        key, extension, kind = saves
        prefix = os.path.normpath(str(values.get("filename_prefix", "ComfyUI_temp_fake")))
        subfolder, _, stem = prefix.rpartition("/")
        folder = self._folders[kind] / subfolder
        if prefix.startswith(("/", "../")) or len(stem) > _LONGEST_STEM:
            raise ValueError(
                "Saving image outside the output folder is not allowed." if len(prefix) < 99 else "too long"
            )
        folder.mkdir(parents=True, exist_ok=True)
        counter = f"{kind}/{prefix}"
        if counter not in self._counters:
            self._counters[counter] = len(list(folder.glob(f"{glob.escape(stem)}_*_.{extension}")))
        self._counters[counter] += 1
        self._mark("saved", prefix)
        filename = f"{stem}_{self._counters[counter]:05}_.{extension}"
        self._write(folder / filename, extension, values, prompt, node_id)
        ui: dict[str, Any] = {key: [{"filename": filename, "subfolder": subfolder, "type": kind}]}
        if extension == "mp4":
            ui["animated"] = [True]
        return ui

    def _write(self, path: Path, extension: str, values: dict[str, Any], prompt: dict[str, Any], node_id: str) -> None:
        if extension == "png":
            source = _source_of_pixels(prompt, node_id)
            path.write_bytes(png(min(source.get("width", 64), 64), min(source.get("height", 64), 64), source["color"]))
        elif extension == "bin":
            with path.open("wb") as file:
                file.truncate(int(values["size_bytes"]))  # sparse: a gigabyte costs nothing to make
                for start in range(0, int(values["size_bytes"]) - 8, 2**20):  # no two stretches of it are equal
                    file.seek(start)
                    file.write(start.to_bytes(8, "big"))
        else:
            path.write_bytes(sample_media(extension))

    def _mark(self, what: str, which: str) -> None:
        """One line per life of this process, start and end of a render (by prompt id) and file saved (by its prefix):
        a kill -9 leaves them behind."""
        if self._ledger is not None:
            with self._ledger.open("a", encoding="utf-8") as file:
                file.write(f"{what} {which}\n")


def _without_keys(extra: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in extra.items() if name not in ("auth_token_comfy_org", "api_key_comfy_org")}


def _source_of_pixels(prompt: Mapping[str, Any], node_id: str) -> dict[str, Any]:
    for other_id in reversed(_order(prompt, [node_id])):
        if prompt[other_id]["class_type"] == "EmptyImage":
            return dict(prompt[other_id]["inputs"])
    return {"color": 0x808080}


def _order(prompt: Mapping[str, Any], outputs: list[str]) -> list[str]:
    """Sources before users; only what the outputs need."""
    order: list[str] = []
    stack = [(output, False) for output in reversed(outputs)]
    while stack:
        node_id, ready = stack.pop()
        if node_id in order:
            continue
        if ready:
            order.append(node_id)
            continue
        stack.append((node_id, True))
        for value in prompt[node_id]["inputs"].values():
            if is_link(value) and value[0] not in order:
                stack.append((value[0], False))
    return order


def _signature(prompt: Mapping[str, Any], node_id: str) -> Any:
    node = prompt[node_id]
    parts: list[Any] = [node["class_type"]]
    for name in sorted(node["inputs"]):
        value = node["inputs"][name]
        if is_link(value) and value[0] in prompt:
            parts.append((name, _signature(prompt, value[0]), value[1]))
        else:
            parts.append((name, _hashable(value)))
    return tuple(parts)


def _hashable(value: Any) -> Any:
    """Recursive on purpose: JSON nested some 900 deep ends the thread, as it does in ComfyUI."""
    if isinstance(value, list):
        return tuple(_hashable(inner) for inner in value)
    if isinstance(value, dict):
        return tuple((name, _hashable(inner)) for name, inner in value.items())
    return value
