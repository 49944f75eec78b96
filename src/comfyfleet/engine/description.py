"""A node as `GET /object_info` describes it: derived from its declaration, in the shape ComfyUI gives that node.

ComfyUI declares nodes in two ways, and clients see which: those by schema say of themselves whether they are
experimental, deprecated or remote, always give an input's facts, and name a list "COMBO". A node that is not in the
tables below is described in the older way, as one of ComfyUI's own module. All texts are ours.
"""

from __future__ import annotations

from typing import Any

from comfyfleet.engine.inputs import input_config
from comfyfleet.engine.registry import Declaration, Folders, Input

_EXTRAS = {
    "nodes_video": "CreateVideo SaveVideo SaveWEBM",
    "nodes_ace": "EmptyAceStepLatentAudio TextEncodeAceStepAudio",
    "nodes_audio": "EmptyAudio LoadAudio PreviewAudio SaveAudio SaveAudioMP3 SaveAudioOpus VAEDecodeAudio "
    "VAEEncodeAudio",
    "nodes_hunyuan": "EmptyHunyuanLatentVideo",
    "nodes_post_processing": "ImageBlur",
    "nodes_images": "ImageFromBatch RepeatImageBatch SaveAnimatedWEBP",
    "nodes_latent": "LatentApplyOperationCFG LatentOperationTonemapReinhard",
    "nodes_model_advanced": "ModelSamplingSD3",
    "nodes_preview_any": "PreviewAny",
    "nodes_primitive": "PrimitiveBoolean PrimitiveFloat PrimitiveInt PrimitiveString PrimitiveStringMultiline",
}
MODULES = {name: f"comfy_extras.{module}" for module, names in _EXTRAS.items() for name in names.split()}
BY_SCHEMA = {
    "CreateVideo", "SaveVideo", "SaveWEBM", "EmptyAceStepLatentAudio", "TextEncodeAceStepAudio", "ImageBlur",
    "LatentApplyOperationCFG", "LatentOperationTonemapReinhard", "PrimitiveBoolean", "PrimitiveFloat", "PrimitiveInt",
    "PrimitiveString", "PrimitiveStringMultiline",
}  # fmt: skip
EXPERIMENTAL = {"LatentApplyOperationCFG", "LatentOperationTonemapReinhard", "SaveWEBM"}
OUTPUT_TIPS = {
    "CheckpointLoaderSimple": ("The diffusion model.", "The text encoder.", "The autoencoder."),
    "CLIPTextEncode": ("The encoded prompt.",),
    "EmptyLatentImage": ("Latents without a picture in them.",),
    "KSampler": ("The sampled latent.",),
    "LoraLoader": ("The changed diffusion model.", "The changed text encoder."),
    "LoraLoaderModelOnly": ("The changed diffusion model.",),
    "VAEDecode": ("The pictures.",),
}


def object_info(declaration: Declaration, folders: Folders) -> dict[str, Any]:
    """The description of one node."""
    name = declaration.name
    by_schema = name in BY_SCHEMA
    described: dict[str, dict[str, Any]] = {"required": {}, "optional": {}}
    for input_name, declared in declaration.inputs.items():
        group = described["required" if declared.required else "optional"]
        group[input_name] = _by_schema(declared, folders) if by_schema else _plainly(declared, folders)
    if not described["optional"]:
        del described["optional"]
    if declaration.hidden:
        described["hidden"] = {key: [kind] if by_schema else kind for key, kind in declaration.hidden.items()}
    info = {
        "input": described,
        "input_order": {group: list(names) for group, names in described.items()},
        "output": list(declaration.outputs),
        "output_is_list": [False] * len(declaration.outputs),
        "output_name": list(declaration.output_names),
        "name": name,
        "display_name": None if by_schema and declaration.display_name == name else declaration.display_name,
        "description": declaration.description,
        "python_module": MODULES.get(name, "nodes"),
        "category": declaration.category,
        "output_node": declaration.is_output,
    }
    if name in OUTPUT_TIPS or by_schema:
        info["output_tooltips"] = list(OUTPUT_TIPS.get(name, (None,) * len(declaration.outputs)))
    if by_schema:
        info |= {"deprecated": False, "experimental": name in EXPERIMENTAL, "api_node": False}
    return info


def _plainly(declared: Input, folders: Folders) -> list[Any]:
    kind, facts = input_config(declared, folders)
    return [kind, facts] if facts or kind == "*" else [kind]


def _by_schema(declared: Input, folders: Folders) -> list[Any]:
    kind, facts = input_config(declared, folders, by_schema=True)
    return [kind, {"multiline": False, **facts} if kind == "STRING" else facts]
