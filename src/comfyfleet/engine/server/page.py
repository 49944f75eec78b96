"""`GET /`: what this is and what it lacks, for whoever opens the port in a browser."""

from __future__ import annotations

from html import escape

from comfyfleet.engine.server.engine import Engine

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>comfyfleet embedded engine</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:3rem auto;padding:0 1rem}}
code{{background:#8882;padding:.1em .3em;border-radius:3px}}</style>
<h1>comfyfleet embedded engine</h1>
<p>It runs workflow graphs in ComfyUI's API format and speaks ComfyUI's HTTP and WebSocket protocol
for the nodes listed below. Post a graph to <code>/prompt</code>, listen on <code>/ws</code>, read
<code>/history</code>, fetch files from <code>/view</code>; <code>/object_info</code> describes every node.</p>
<p>State: {state}. Waiting or running: {remaining}.</p>
<h2>What it lacks</h2>
<ul>
<li>ComfyUI's editor: there is no canvas here, only the API.</li>
<li>Custom nodes, and every node that is not listed: a graph that names one is refused, with the node's name. Point
<code>COMFYUI_API_BASE</code> or <code>COMFYUI_INSTALL_PATH</code> of a worker at a real ComfyUI for those.</li>
<li>Real pictures, films and music for as long as only <em>miniature</em> checkpoints are there: they exercise the whole
path and make noise. Results made with one say so (<code>meta.miniature</code> in the history).</li>
<li>Several users, workflow templates and translations: the routes are there and empty.</li>
</ul>
<h2>Nodes ({count})</h2>
<p>{nodes}</p>
</html>
"""


def page(engine: Engine) -> str:
    names = sorted(engine.declarations)
    return _PAGE.format(
        state="ready" if engine.ready.is_set() else "the render process is starting",
        remaining=engine.queue.remaining,
        count=len(names),
        nodes=", ".join(f"<code>{escape(name)}</code>" for name in names) or "known when the render process is ready",
    )
