"""Nodes from words to conditionings."""

from __future__ import annotations

from comfyfleet.engine.models.open_file import stop_at_layer
from comfyfleet.engine.registry import NodeRegistry, NodeRun, integer, link, text
from comfyfleet.engine.values import Conditioning, TextEncoder

NODES = NodeRegistry()


@NODES.node(
    "CLIPTextEncode",
    inputs={
        "text": text(multiline=True, dynamicPrompts=True, tooltip="The text to be encoded."),
        "clip": link("CLIP", tooltip="The CLIP model used for encoding the text."),
    },
    outputs=["CONDITIONING"],
    category="conditioning",
    display_name="CLIP Text Encode (Prompt)",
    description=(
        "Encodes a text prompt using a CLIP model into an embedding that can be used to guide the diffusion model "
        "towards generating specific images."
    ),
)
def clip_text_encode(run: NodeRun, *, text: str, clip: TextEncoder) -> tuple[Conditioning]:
    return ((clip.encode(text),),)


@NODES.node(
    "CLIPSetLastLayer",
    inputs={"clip": link("CLIP"), "stop_at_clip_layer": integer(-1, -24, -1, step=1)},
    outputs=["CLIP"],
    category="conditioning",
    display_name="CLIP Set Last Layer",
)
def clip_set_last_layer(run: NodeRun, *, clip: TextEncoder, stop_at_clip_layer: int) -> tuple[TextEncoder]:
    return (stop_at_layer(clip, stop_at_clip_layer),)
