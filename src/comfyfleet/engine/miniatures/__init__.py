"""Miniature model files under the documents' own names, so that every workflow runs on a fresh machine.

They are made on first start from a seed: the real layouts and the real code paths, with networks so thin that a film
takes half a minute on two cores. They make patterns, not pictures, and say so: `miniature: "true"` stands in each
file's metadata, and every result made with one is marked.

`ensure` is all that others need. It is quick where the files exist, and imports torch only where one must be made.
"""

from __future__ import annotations

from comfyfleet.engine.miniatures.provision import ensure

__all__ = ["ensure"]
