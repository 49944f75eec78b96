"""A graph rendered in this process, with no servers: for `comfyfleet run` and measurements. Loads torch."""

from __future__ import annotations

from typing import Any

from comfyfleet.clock import SystemClock
from comfyfleet.engine.events import Emit, RunOutcome
from comfyfleet.engine.executor import Job
from comfyfleet.engine.graph import PromptRefused, check_prompt
from comfyfleet.engine.render.machine import make_executor
from comfyfleet.engine.render.setup import RenderSettings, keep_freed_memory
from comfyfleet.ids import SystemIds


def run_graph(graph: dict[str, Any], folders: RenderSettings, on_event: Emit) -> RunOutcome:
    """Check and run every output of a graph in ComfyUI's API format. Raises PromptRefused; failures are in the outcome.

    `folders` names the folders and the device. All-or-nothing: a graph with one bad output is refused as a whole.
    """
    keep_freed_memory()
    clock, ids = SystemClock(), SystemIds()
    files = folders.folders(clock, ids)
    executor = make_executor(folders, files, clock)
    checked = check_prompt(graph, executor.registry.declarations(), files)
    if checked.node_errors:
        raise PromptRefused(
            "prompt_outputs_failed_validation",
            "Prompt outputs failed validation",
            node_errors=checked.node_errors,
        )
    job = Job(prompt_id=ids.request_id(), graph=graph, outputs=checked.outputs, extra_pnginfo={})
    return executor.run(job, on_event, lambda: False)
