"""A run's events as ComfyUI's messages: their shapes, their order, and who gets them.

With a client id, its socket gets everything. Without one nobody is told of the run itself; only the state of its nodes,
their progress, previews and an interrupt go to everyone, as in ComfyUI.
"""

from __future__ import annotations

from typing import Any

from comfyfleet.engine import events
from comfyfleet.engine.server.prompts import PromptRecord
from comfyfleet.engine.server.sockets import Hub, encode


class Teller:
    """Tells one run. Remembers each node's state, which every `progress_state` repeats."""

    def __init__(self, hub: Hub, record: PromptRecord) -> None:
        self._hub = hub
        self._record = record
        self._prompt_id = record.item.prompt_id
        self._client_id = record.item.client_id
        self._states: dict[str, str] = {}
        self._limits: dict[str, float] = {}
        self.current_node: str | None = None

    def tell(self, event: events.Event) -> None:
        """Send what this event means to clients, and keep what history keeps."""
        match event:
            case events.RunStarted():
                self._keep_and_send("execution_start", {"prompt_id": self._prompt_id, "timestamp": event.timestamp_ms})
            case events.CacheHits():
                data = {"nodes": event.nodes, "prompt_id": self._prompt_id, "timestamp": event.timestamp_ms}
                self._keep_and_send("execution_cached", data)
            case events.NodeStarted(node=node):
                self.current_node = node
                self._state(node, 0.0, 1.0, "running")
                self._send("executing", {"node": node, "display_node": node, "prompt_id": self._prompt_id})
            case events.NodeProgress(node=node):
                self._progress(event)
            case events.NodeShown(node=node, ui=ui):
                self._shown(node, ui)
            case events.NodeFinished(node=node):
                limit = self._limits.get(node, 1.0)
                self._state(node, limit, limit, "finished")
            case events.NodeReused(node=node, ui=ui):
                if ui is not None:
                    self._shown(node, ui)
                self._state(node, 1, 1, "finished")
            case events.RunSucceeded():
                data = {"prompt_id": self._prompt_id, "timestamp": event.timestamp_ms}
                self._keep_and_send("execution_success", data)
            case events.RunFailed():
                self._keep_and_send("execution_error", self._failure(event))
            case events.RunInterrupted():
                self._interrupted(event)

    def _progress(self, event: events.NodeProgress) -> None:
        value, maximum = _whole(event.value), _whole(event.maximum)
        self._limits[event.node] = maximum
        self._state(event.node, value, maximum, "running")
        data = {"value": value, "max": maximum, "prompt_id": self._prompt_id, "node": event.node}
        self._hub.send("progress", data, self._client_id)
        if event.preview is not None:
            media_type = "image/png" if event.preview_is_png else "image/jpeg"
            self._hub.send_preview(event.preview, media_type, self._place(event.node), self._client_id)

    def _shown(self, node: str, ui: events.Ui) -> None:
        self._send("executed", {"node": node, "display_node": node, "output": ui, "prompt_id": self._prompt_id})

    def _state(self, node: str, value: float, maximum: float, state: str) -> None:
        data = {"value": value, "max": maximum, "state": state, **self._place(node)}
        self._states[node] = f"{encode(node).decode()}:{encode(data).decode()}"
        if not self._hub.is_listening(self._client_id):
            return
        # Put together from texts that are ready: with a thousand nodes this is sent some thousand times.
        nodes = ",".join(self._states.values())
        prompt_id = encode(self._prompt_id).decode()
        text = f'{{"type":"progress_state","data":{{"prompt_id":{prompt_id},"nodes":{{{nodes}}}}}}}'
        self._hub.send_text("progress_state", text, self._client_id)

    def _place(self, node: str) -> dict[str, Any]:
        return {
            "node_id": node,
            "prompt_id": self._prompt_id,
            "display_node_id": node,
            "parent_node_id": None,
            "real_node_id": node,
        }

    def _failure(self, event: events.RunFailed) -> dict[str, Any]:
        return {
            "prompt_id": self._prompt_id,
            "node_id": event.node_id,
            "node_type": event.node_type,
            "executed": event.executed,
            "exception_message": event.exception_message,
            "exception_type": event.exception_type,
            "traceback": event.traceback,
            "current_inputs": event.current_inputs,
            "current_outputs": event.current_outputs,
            "timestamp": event.timestamp_ms,
        }

    def _interrupted(self, event: events.RunInterrupted) -> None:
        data = {
            "prompt_id": self._prompt_id,
            "node_id": event.node_id,
            "node_type": event.node_type,
            "executed": event.executed,
            "timestamp": event.timestamp_ms,
        }
        self._record.messages.append(("execution_interrupted", data))
        self._hub.send("execution_interrupted", data, self._client_id)

    def _keep_and_send(self, kind: str, data: dict[str, Any]) -> None:
        self._record.messages.append((kind, data))
        self._send(kind, data)

    def _send(self, kind: str, data: dict[str, Any]) -> None:
        if self._client_id is not None:
            self._hub.send(kind, data, self._client_id)


def _whole(value: float) -> float:
    """Steps are counted in whole numbers; floats come from the wire."""
    return int(value) if value == int(value) else value
