"""An engine without processes: folders in a temporary place, our nodes or made-up ones, an executor on a fake clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfyfleet.engine.cache import ResultCache
from comfyfleet.engine.events import Event, RunOutcome
from comfyfleet.engine.executor import Executor, Job
from comfyfleet.engine.folders import EngineFolders, FolderPaths
from comfyfleet.engine.graph import check_prompt
from comfyfleet.engine.memory import Residency
from comfyfleet.engine.nodes import all_nodes
from comfyfleet.engine.registry import NodeRegistry
from comfyfleet.ids import SeededIds
from comfyfleet.testing.clock import FakeClock


def folders_below(root: Path, clock: FakeClock | None = None) -> EngineFolders:
    paths = FolderPaths(
        models=root / "models",
        miniatures=root / "miniatures",
        input=root / "input",
        output=root / "output",
        temp=root / "temp",
        user=root / "user",
    )
    return EngineFolders(paths, clock or FakeClock(), SeededIds(1))


class EngineWorld:
    """`run` checks and runs a prompt; what was told is in `events`."""

    def __init__(self, root: Path, registry: NodeRegistry | None = None, cache_bytes: int = 1 << 30) -> None:
        self.clock = FakeClock()
        self.folders = folders_below(root, self.clock)
        self.registry = registry if registry is not None else all_nodes()
        self.residency = Residency("cpu", 1 << 40)
        self.executor = Executor(
            registry=self.registry,
            folders=self.folders,
            cache=ResultCache(cache_bytes),
            residency=self.residency,
            clock=self.clock,
        )
        self.events: list[Event] = []
        self.stop = False

    def run(
        self, graph: dict[str, Any], targets: list[str] | None = None, extra_pnginfo: dict | None = None
    ) -> RunOutcome:
        self.events = []
        checked = check_prompt(graph, self.registry.declarations(), self.folders, targets)
        job = Job(prompt_id="p", graph=graph, outputs=checked.outputs, extra_pnginfo=extra_pnginfo or {})
        return self.executor.run(job, self.events.append, lambda: self.stop)

    def told(self) -> list[str]:
        """Events in short: the kind, and the node where there is one."""
        return [f"{type(event).__name__} {getattr(event, 'node', '')}".strip() for event in self.events]

    def ran(self) -> list[str]:
        return [event.node for event in self.events if type(event).__name__ == "NodeStarted"]

    def output_files(self) -> list[str]:
        root = self.folders.paths.output
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}
