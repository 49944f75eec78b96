"""The golden ACE-Step checkpoint and records, opened once; and how near two tensors are."""

import functools
import json
from pathlib import Path

from safetensors.torch import load_file

from comfyfleet.engine.models import ace
from comfyfleet.engine.models.checkpoint import open_checkpoint
from comfyfleet.engine.values import ConditioningEntry

GOLDENS = Path(__file__).parents[3] / "goldens"
CHECKPOINT = GOLDENS / "models" / "checkpoints" / "golden_ace_step.safetensors"


@functools.cache
def parts():
    """(DiffusionModel, AceTextEncoder, AceAutoencoder) of the golden checkpoint."""
    return ace.load(open_checkpoint(CHECKPOINT))


@functools.cache
def tensors(case):
    return load_file(GOLDENS / "ace" / case / "record.safetensors")


@functools.cache
def record(case):
    return json.loads((GOLDENS / "ace" / case / "record.json").read_text())


@functools.cache
def graph(case):
    return json.loads((GOLDENS / "ace" / case / "graph.json").read_text())


def distance(found, expected):
    """The goldens' rel: norm of the difference over norm."""
    return float((found - expected).norm() / expected.norm())


def zeroed(entry):
    """What ConditioningZeroOut makes of an ACE-Step prompt."""
    return ConditioningEntry(
        embedding=entry.embedding * 0, lyric_ids=entry.lyric_ids * 0, lyrics_strength=entry.lyrics_strength
    )
