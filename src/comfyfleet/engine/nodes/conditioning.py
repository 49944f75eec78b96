"""Conditionings put together: CONDITIONING is a tuple of `engine.values.ConditioningEntry`."""

from __future__ import annotations

import dataclasses

import torch

from comfyfleet.engine.registry import NodeRegistry, NodeRun, link, real
from comfyfleet.engine.values import Conditioning

NODES = NodeRegistry()


@NODES.node(
    "ConditioningCombine",
    inputs={"conditioning_1": link("CONDITIONING"), "conditioning_2": link("CONDITIONING")},
    outputs=["CONDITIONING"],
    category="conditioning",
    display_name="Conditioning (Combine)",
)
def combine(run: NodeRun, *, conditioning_1: Conditioning, conditioning_2: Conditioning) -> tuple[Conditioning]:
    return (tuple(conditioning_1) + tuple(conditioning_2),)


@NODES.node(
    "ConditioningAverage",
    inputs={
        "conditioning_to": link("CONDITIONING"),
        "conditioning_from": link("CONDITIONING"),
        "conditioning_to_strength": real(1.0, 0.0, 1.0, step=0.01),
    },
    outputs=["CONDITIONING"],
    category="conditioning",
)
def average(
    run: NodeRun, *, conditioning_to: Conditioning, conditioning_from: Conditioning, conditioning_to_strength: float
) -> tuple[Conditioning]:
    """to x strength + from x (1 - strength); the first `from` counts, cut or zero-filled to each `to`'s length."""
    share = conditioning_to_strength
    other = conditioning_from[0]
    mixed = []
    for entry in conditioning_to:
        tokens = entry.embedding.shape[1]
        filler = other.embedding[:, :tokens]
        if filler.shape[1] < tokens:
            missing = torch.zeros((filler.shape[0], tokens - filler.shape[1], filler.shape[2]), dtype=filler.dtype)
            filler = torch.cat([filler, missing], dim=1)
        pooled = entry.pooled if entry.pooled is not None else other.pooled
        if entry.pooled is not None and other.pooled is not None:
            pooled = entry.pooled * share + other.pooled * (1.0 - share)
        embedding = entry.embedding * share + filler * (1.0 - share)
        mixed.append(dataclasses.replace(entry, embedding=embedding, pooled=pooled))
    return (tuple(mixed),)


@NODES.node(
    "ConditioningZeroOut",
    inputs={"conditioning": link("CONDITIONING")},
    outputs=["CONDITIONING"],
    category="advanced/conditioning",
)
def zero_out(run: NodeRun, *, conditioning: Conditioning) -> tuple[Conditioning]:
    """Zero embeddings, zero pooled vectors, and lyric ids all 0 (which is a row of the table, not silence)."""
    return (
        tuple(
            dataclasses.replace(
                entry,
                embedding=torch.zeros_like(entry.embedding),
                pooled=torch.zeros_like(entry.pooled) if entry.pooled is not None else None,
                lyric_ids=torch.zeros_like(entry.lyric_ids) if entry.lyric_ids is not None else None,
            )
            for entry in conditioning
        ),
    )
