"""Textual-inversion files: rows that a prompt's `embedding:name` puts in the place of a token's.

A file of the embeddings folder, with or without its extension, also in a sub-folder. It holds (rows, width) under the
encoder's name ("clip_l"), as parts of a bundle, or as its only tensor. Source: Gal et al. 2022. Pickles are refused.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from comfyfleet.engine.models.checkpoint import Checkpoint, open_checkpoint
from comfyfleet.engine.models.prompt_weights import EMBEDDING_WORD
from comfyfleet.engine.registry import Folders

FOLDER = "embeddings"
EXTENSIONS = ("", ".safetensors", ".pt", ".bin")
BUNDLE = "bundle_emb."
PART = "clip_l"


class TextualInversions:
    """The files that a prompt for CLIP-L may name."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders

    def find(self, name: str) -> Tensor | None:
        """(rows, width) float32, or None. Raises ModelFileUnusable for a pickle or a broken file."""
        path = file_of(name, self._folders)
        return None if path is None else _rows(open_checkpoint(path)).float()


def file_of(name: str, folders: Folders) -> Path | None:
    """The file that a prompt means; a name leads nowhere but into the embeddings folder."""
    known = folders.model_names(FOLDER) if name else []
    for extension in EXTENSIONS:
        for candidate in known:
            if candidate == name + extension or candidate.endswith(f"/{name}{extension}"):
                return Path(folders.model_path(FOLDER, candidate))
    return None


def files_named(text: str, folders: Folders) -> list[str]:
    """The files that exist of those a prompt names."""
    names = [word.split()[0] for word in text.split(EMBEDDING_WORD)[1:] if word.strip()]
    found = [file_of(cut, folders) for name in names for cut in (name, name.strip(",()"), name.split(":")[0])]
    return sorted({str(path) for path in found if path is not None})


def _rows(file: Checkpoint) -> Tensor:
    if PART in file:
        return file.tensor(PART)
    for ending in (".string_to_param.*", f".{PART}"):
        bundled = [file.tensor(name) for name in file if name.startswith(BUNDLE) and name.endswith(ending)]
        if bundled:
            return torch.cat(bundled)
    return file.tensor(next(iter(file), ""))
