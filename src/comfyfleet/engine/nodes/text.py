"""Nodes from words to conditionings."""

from __future__ import annotations

from comfyfleet.engine.models.clip_text import ClipEncoder
from comfyfleet.engine.models.open_file import stop_at_layer
from comfyfleet.engine.models.textual_inversion import TextualInversions
from comfyfleet.engine.registry import Input, NodeRegistry, NodeRun, integer, link
from comfyfleet.engine.values import Conditioning, TextEncoder

NODES = NodeRegistry()


@NODES.node(
    "CLIPTextEncode",
    inputs={
        "text": Input(
            kind="STRING",
            details={"multiline": True, "dynamicPrompts": True, "tooltip": "The prompt; (words:1.2) weigh more."},
        ),
        "clip": link("CLIP", tooltip="The text encoder."),
    },
    outputs=["CONDITIONING"],
    category="conditioning",
    display_name="CLIP Text Encode (Prompt)",
    description="Turns a prompt into what guides a diffusion model.",
)
def clip_text_encode(run: NodeRun, *, text: str, clip: TextEncoder) -> tuple[Conditioning]:
    entry = (
        clip.encode(text, TextualInversions(run.folders).find) if isinstance(clip, ClipEncoder) else clip.encode(text)
    )
    return ((entry,),)


@NODES.node(
    "CLIPSetLastLayer",
    inputs={"clip": link("CLIP"), "stop_at_clip_layer": integer(-1, -24, -1, step=1)},
    outputs=["CLIP"],
    category="conditioning",
    display_name="CLIP Set Last Layer",
)
def clip_set_last_layer(run: NodeRun, *, clip: TextEncoder, stop_at_clip_layer: int) -> tuple[TextEncoder]:
    return (stop_at_layer(clip, stop_at_clip_layer),)
