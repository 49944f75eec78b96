"""The embedded engine: a graph in ComfyUI's API format goes in, events and files come out.

It knows no jobs, no settings, and no HTTP outside `server/`. It computes what ComfyUI 0.3.64 computes, written anew
from the formulas; a node it lacks is refused by name.

Reading order: values, registry, graph, plan, executor, nodes/, sampling/, models/, render/, server/.
"""
