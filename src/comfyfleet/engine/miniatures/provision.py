"""Which miniature files there are, and making those that are missing: atomically, once, never over another file."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 20250722
RECIPE = "4"  # a file made by another recipe is made anew


@dataclass(frozen=True)
class Recipe:
    """`module.function(seed)` in this package gives (tensors, metadata)."""

    module: str
    function: str
    seed: int = SEED


FILES: dict[str, Recipe] = {
    "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors": Recipe("umt5", "tensors"),
    "vae/wan_2.1_vae.safetensors": Recipe("wan_vae", "tensors"),
    "diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": Recipe("wan", "tensors"),
    "diffusion_models/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": Recipe("wan", "tensors", SEED + 1),
    "loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors": Recipe("wan", "lora", SEED + 2),
    "loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors": Recipe("wan", "lora", SEED + 3),
    "checkpoints/ace_step_v1_3.5b.safetensors": Recipe("ace", "tensors"),
    "checkpoints/v1-5-pruned-emaonly-fp16.safetensors": Recipe("sd15", "tensors"),
    "checkpoints/v1-5-pruned-emaonly.safetensors": Recipe("sd15", "tensors"),
}


def ensure(directory: str | Path) -> list[str]:
    """Make what is missing under `directory`; returns the names made. Safe with several processes at once."""
    root = Path(directory)
    if not _missing(root):
        return []
    root.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(root):
        made = _missing(root)
        for name in made:
            _make(root / name, FILES[name])
    return made


def _missing(root: Path) -> list[str]:
    return [name for name in FILES if not _is_current(root / name)]


def _is_current(path: Path) -> bool:
    """True for a file that is to be left alone: a miniature of this recipe, or no miniature at all."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes)) if header_bytes < path.stat().st_size else {}
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True  # not ours, whatever it is
    metadata = header.get("__metadata__") or {}
    return metadata.get("miniature") != "true" or metadata.get("recipe") == RECIPE


def _make(path: Path, recipe: Recipe) -> None:
    save_file: Any = importlib.import_module("safetensors.torch").save_file
    maker = getattr(importlib.import_module(f"comfyfleet.engine.miniatures.{recipe.module}"), recipe.function)
    tensors, metadata = maker(recipe.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, staging, metadata={**metadata, "miniature": "true", "recipe": RECIPE})
    staging.chmod(0o644)
    if _is_current(path):  # somebody put a real file there meanwhile
        staging.unlink()
    else:
        os.replace(staging, path)


@contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
