"""The project's copy of what ComfyUI 0.3.64 computed (tests/goldens/README.md says how they were made)."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

GOLDENS = Path(__file__).parents[0] / "goldens"
MODELS = GOLDENS / "models"


def tensors(name):
    return load_file(GOLDENS / f"{name}.safetensors")


def facts(name):
    return json.loads((GOLDENS / f"{name}.json").read_text())


def relative_error(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())
