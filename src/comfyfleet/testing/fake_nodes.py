"""The fake engine's nodes: enough declarations to check a graph as ComfyUI does, and tiny real files to save.

Not a renderer. A node here has inputs to check, a time to take and perhaps a file to leave; nothing is computed.
The `Fake*` nodes exist for tests: a silent wait, a wait that a test ends, a fault in mid-run, a file of any size.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comfyfleet.wire.workflow import is_link


@dataclass(frozen=True, kw_only=True)
class FakeNode:
    """inputs: name → type ("INT", "IMAGE", …); limits: name → (min, max); saves: (ui key, extension, folder)."""

    inputs: Mapping[str, str]
    outputs: tuple[str, ...] = ()
    limits: Mapping[str, tuple[float, float]] | None = None
    options: Mapping[str, tuple[str, ...]] | None = None
    saves: tuple[str, str, str] | None = None
    is_output: bool = False
    uploads: tuple[str, ...] = ()  # inputs that the frontend has an upload button for


def _save(kind: str, source: str, key: str, extension: str, folder: str = "output", **inputs: str) -> FakeNode:
    wanted = {source: kind, **inputs}
    if folder == "output":
        wanted["filename_prefix"] = "STRING"
    return FakeNode(inputs=wanted, saves=(key, extension, folder), is_output=True)


NODES: dict[str, FakeNode] = {
    "EmptyImage": FakeNode(
        inputs={"width": "INT", "height": "INT", "batch_size": "INT", "color": "INT"},
        outputs=("IMAGE",),
        limits={"width": (1, 16384), "height": (1, 16384), "batch_size": (1, 4096), "color": (0, 0xFFFFFF)},
    ),
    "ImageScale": FakeNode(
        inputs={"image": "IMAGE", "upscale_method": "STRING", "width": "INT", "height": "INT", "crop": "STRING"},
        outputs=("IMAGE",),
    ),
    "LoadImage": FakeNode(inputs={"image": "STRING"}, outputs=("IMAGE", "MASK")),
    "SaveImage": _save("IMAGE", "images", "images", "png"),
    "PreviewImage": _save("IMAGE", "images", "images", "png", "temp"),
    "SaveAudioMP3": _save("AUDIO", "audio", "audio", "mp3", quality="STRING"),
    "SaveAudio": _save("AUDIO", "audio", "audio", "flac"),
    "SaveVideo": _save("VIDEO", "video", "images", "mp4", format="STRING", codec="STRING"),
    "CheckpointLoaderSimple": FakeNode(inputs={"ckpt_name": "STRING"}, outputs=("MODEL", "CLIP", "VAE")),
    "CLIPTextEncode": FakeNode(inputs={"text": "STRING", "clip": "CLIP"}, outputs=("CONDITIONING",)),
    "EmptyLatentImage": FakeNode(
        inputs={"width": "INT", "height": "INT", "batch_size": "INT"},
        outputs=("LATENT",),
        limits={"width": (16, 16384), "height": (16, 16384), "batch_size": (1, 4096)},
    ),
    "KSampler": FakeNode(
        inputs={
            "model": "MODEL",
            "seed": "INT",
            "steps": "INT",
            "cfg": "FLOAT",
            "sampler_name": "STRING",
            "scheduler": "STRING",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
            "denoise": "FLOAT",
        },
        outputs=("LATENT",),
        limits={"seed": (0, 2**64 - 1), "steps": (1, 10000), "cfg": (0.0, 100.0), "denoise": (0.0, 1.0)},
    ),
    "VAEDecode": FakeNode(inputs={"samples": "LATENT", "vae": "VAE"}, outputs=("IMAGE",)),
    "TextEncodeAceStepAudio": FakeNode(
        inputs={"clip": "CLIP", "tags": "STRING", "lyrics": "STRING", "lyrics_strength": "FLOAT"},
        outputs=("CONDITIONING",),
    ),
    "EmptyAceStepLatentAudio": FakeNode(inputs={"seconds": "FLOAT", "batch_size": "INT"}, outputs=("LATENT",)),
    "VAEDecodeAudio": FakeNode(inputs={"samples": "LATENT", "vae": "VAE"}, outputs=("AUDIO",)),
    "ConditioningZeroOut": FakeNode(inputs={"conditioning": "CONDITIONING"}, outputs=("CONDITIONING",)),
    "LatentApplyOperationCFG": FakeNode(inputs={"model": "MODEL", "operation": "LATENT_OPERATION"}, outputs=("MODEL",)),
    "LatentOperationTonemapReinhard": FakeNode(inputs={"multiplier": "FLOAT"}, outputs=("LATENT_OPERATION",)),
    "ModelSamplingSD3": FakeNode(inputs={"model": "MODEL", "shift": "FLOAT"}, outputs=("MODEL",)),
    "CLIPLoader": FakeNode(inputs={"clip_name": "STRING", "type": "STRING"}, outputs=("CLIP",)),
    "VAELoader": FakeNode(inputs={"vae_name": "STRING"}, outputs=("VAE",)),
    "UNETLoader": FakeNode(inputs={"unet_name": "STRING", "weight_dtype": "STRING"}, outputs=("MODEL",)),
    "LoraLoaderModelOnly": FakeNode(
        inputs={"model": "MODEL", "lora_name": "STRING", "strength_model": "FLOAT"}, outputs=("MODEL",)
    ),
    "EmptyHunyuanLatentVideo": FakeNode(
        inputs={"width": "INT", "height": "INT", "length": "INT", "batch_size": "INT"}, outputs=("LATENT",)
    ),
    "KSamplerAdvanced": FakeNode(
        inputs={
            "model": "MODEL",
            "add_noise": "STRING",
            "noise_seed": "INT",
            "steps": "INT",
            "cfg": "FLOAT",
            "sampler_name": "STRING",
            "scheduler": "STRING",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
            "start_at_step": "INT",
            "end_at_step": "INT",
            "return_with_leftover_noise": "STRING",
        },
        outputs=("LATENT",),
        limits={"noise_seed": (0, 2**64 - 1), "steps": (1, 10000)},
    ),
    "CreateVideo": FakeNode(inputs={"images": "IMAGE", "fps": "FLOAT"}, outputs=("VIDEO",)),
    # For tests only.
    "FakeSleep": FakeNode(inputs={"images": "IMAGE", "seconds": "FLOAT"}, outputs=("IMAGE",)),
    "FakeGate": FakeNode(inputs={"images": "IMAGE", "gate": "STRING"}, outputs=("IMAGE",)),
    "FakeDeaf": FakeNode(inputs={"images": "IMAGE", "gate": "STRING"}, outputs=("IMAGE",)),
    "FakePicker": FakeNode(inputs={"choice": "STRING"}, outputs=("IMAGE",), uploads=("choice",)),
    "FakeFault": FakeNode(inputs={"images": "IMAGE", "fault": "STRING"}, outputs=("IMAGE",)),
    "FakeBig": FakeNode(
        inputs={"size_bytes": "INT", "filename_prefix": "STRING"}, saves=("files", "bin", "output"), is_output=True
    ),
}


_DEFAULTS = {"width": 512, "height": 512}


def convert(kind: str, value: Any) -> Any:
    """ComfyUI's conversion, in place and before the range check; raises ValueError or TypeError."""
    if kind == "INT":
        return int(value)
    if kind == "FLOAT":
        return float(value)
    if kind == "STRING":
        return str(value)
    return value


def object_info(name: str) -> dict[str, Any]:
    """`/object_info` for one node, as far as declared here."""
    node = NODES[name]
    required: dict[str, Any] = {}
    for input_name, kind in node.inputs.items():
        low, high = (node.limits or {}).get(input_name, (None, None))
        details: dict[str, Any] = {}
        if low is not None:
            details = {"default": _DEFAULTS.get(input_name, low), "min": low, "max": high, "step": 1}
        if input_name in node.uploads:
            details["image_upload"] = True
        required[input_name] = [kind, details]
    return {
        "input": {"required": required},
        "input_order": {"required": list(required)},
        "output": list(node.outputs),
        "output_is_list": [False] * len(node.outputs),
        "output_name": list(node.outputs),
        "name": name,
        "display_name": name,
        "description": "",
        "python_module": "nodes",
        "category": "fake",
        "output_node": node.is_output,
    }


def literals(node: Mapping[str, Any]) -> dict[str, Any]:
    """A node's inputs that are no links."""
    return {name: value for name, value in node["inputs"].items() if not is_link(value)}


def png(width: int, height: int, color: int) -> bytes:
    """A real PNG of one colour."""
    row = b"\x00" + bytes(((color >> 16) & 255, (color >> 8) & 255, color & 255)) * width
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(row * height, 1)) + _END


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


_END = _chunk(b"IEND", b"")


@functools.cache
def sample_media(extension: str) -> bytes:
    """A short real file: a second of silence, or eight black frames."""
    import av  # heavy, and only some tests save audio or video

    buffer = io.BytesIO()
    container = av.open(buffer, "w", format=extension)
    if extension == "mp4":
        video = container.add_stream("h264", rate=16, width=64, height=64, pix_fmt="yuv420p")
        for _ in range(8):
            container.mux(video.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(video.encode(None))
    else:
        audio = container.add_stream("libmp3lame" if extension == "mp3" else "flac", rate=44100, layout="stereo")
        frame = av.AudioFrame(format="s16p" if extension == "mp3" else "s16", layout="stereo", samples=1152)
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        frame.sample_rate = 44100
        for index in range(38):
            frame.pts = index * 1152
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    container.close()
    return buffer.getvalue()
