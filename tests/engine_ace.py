"""The golden ACE-Step checkpoint, opened once, and what ConditioningZeroOut makes of its prompts."""

from __future__ import annotations

import functools

from comfyfleet.engine.models import ace
from comfyfleet.engine.models.checkpoint import open_checkpoint
from comfyfleet.engine.values import ConditioningEntry
from engine_goldens import MODELS

CHECKPOINT = MODELS / "checkpoints" / "golden_ace_step.safetensors"


@functools.cache
def parts():
    """(DiffusionModel, AceTextEncoder, AceAutoencoder) of the golden checkpoint."""
    return ace.load(open_checkpoint(CHECKPOINT))


def zeroed(entry):
    return ConditioningEntry(
        embedding=entry.embedding * 0, lyric_ids=entry.lyric_ids * 0, lyrics_strength=entry.lyrics_strength
    )
