"""Run a graph's nodes one after the other and keep what each of them gave: for tests of values inside a graph."""

from __future__ import annotations

from types import SimpleNamespace

from comfyfleet.clock import SystemClock
from comfyfleet.engine.folders import EngineFolders, FolderPaths
from comfyfleet.engine.nodes import all_nodes
from comfyfleet.engine.registry import Shown
from comfyfleet.ids import SystemIds


def folders_of(work, models):
    paths = FolderPaths(
        models=models,
        miniatures=models,
        input=work / "input",
        output=work / "output",
        temp=work / "temp",
        user=work / "user",
    )
    return EngineFolders(paths, SystemClock(), SystemIds())


def values_of(graph, folders, only=None):
    """Node id -> its outputs, or what it shows. `only`: class types to end at, else every node runs."""
    registry, known = all_nodes(), {}

    def value(node_id):
        if node_id not in known:
            node = graph[node_id]
            inputs = {
                name: value(given[0])[given[1]] if isinstance(given, list) else given
                for name, given in node["inputs"].items()
            }
            run = SimpleNamespace(
                node_id=node_id,
                folders=folders,
                prompt=graph,
                extra_pnginfo={},
                device="cpu",
                progress=lambda *_: None,
                check_stop=lambda: None,
                commit=folders.commit,
            )
            result = registry[node["class_type"]].function(run, **inputs)
            known[node_id] = result.ui if isinstance(result, Shown) else result
        return known[node_id]

    for node_id, node in graph.items():
        if only is None or node["class_type"] in only:
            value(node_id)
    return known
