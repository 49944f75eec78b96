"""A safetensors file, opened: names, shapes and metadata now, tensors when asked, straight from the mapped file.

Nothing is copied: `tensor(name)` is a view of the memory-mapped file, so a 14 GB expert costs address space and page
cache, not a second copy. This module knows the container only; `families` knows which model a file holds.
Format: 8 bytes little-endian header length, that many bytes of JSON {name: {dtype, shape, data_offsets}}, then data.
Source: the safetensors format description (huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comfyfleet.wire.errors import ModelFileUnusable

MAX_HEADER_BYTES = 100_000_000  # the format's own limit

# A zip (torch.save), or pickle's PROTO opcode followed by an opcode that pickles begin with.
PICKLE_BEGINS = re.compile(rb"PK\x03\x04|\x80[\x02-\x05][\x8a\x95}\](c]")

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies: `start` and `end` are byte offsets in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The tensors of one file, or of one section of it, by name.

    `section("vae.")` is the same file seen through a prefix, with the prefix taken off. `sizes` is our optional
    metadata block for what shapes cannot tell (head counts, kernel dilations); published files have none.
    """

    path: str
    metadata: Mapping[str, str]
    stored: Mapping[str, StoredTensor]
    bytes_of_file: Tensor = field(repr=False, compare=False)  # uint8, mapped

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def key(self) -> str:
        """Names these weights: the file, its size and its time of change."""
        status = os.stat(self.path)
        return f"{self.path}:{status.st_size}:{status.st_mtime_ns}"

    @property
    def is_miniature(self) -> bool:
        return self.metadata.get("miniature") == "true"

    @property
    def sizes(self) -> Mapping[str, Any]:
        return json.loads(self.metadata["sizes"]) if "sizes" in self.metadata else {}

    @property
    def size_bytes(self) -> int:
        return sum(tensor.end - tensor.start for tensor in self.stored.values())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._find(name).dtype

    def tensor(self, name: str) -> Tensor:
        """A read-only view of the file's bytes; never write to it. Raises ModelFileUnusable for a missing name."""
        place = self._find(name)
        raw = self.bytes_of_file[place.start : place.end]
        if place.start % place.dtype.itemsize:
            raw = raw.clone()  # the format does not promise alignment inside the data block
        if not place.end - place.start:
            return torch.empty(place.shape, dtype=place.dtype)
        return raw.view(place.dtype).reshape(place.shape)

    def section(self, prefix: str) -> Checkpoint:
        """The tensors whose names begin with `prefix`, under what follows it; perhaps none."""
        cut = len(prefix)
        return replace(self, stored={name[cut:]: at for name, at in self.stored.items() if name.startswith(prefix)})

    def count(self, pattern: str) -> int:
        """How many consecutive numbers, from 0, fill the `{}` of a name's beginning: "blocks.{}." counts blocks."""
        number = 0
        while any(name.startswith(pattern.format(number)) for name in self.stored):
            number += 1
        return number

    def _find(self, name: str) -> StoredTensor:
        try:
            return self.stored[name]
        except KeyError:
            raise ModelFileUnusable(
                f"{Path(self.path).name} lacks the tensor {name}", file=Path(self.path).name, tensor=name
            ) from None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Map a .safetensors file. Raises ModelFileUnusable for anything else, saying what it found instead."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        beginning = file.read(8)
        header_bytes = int.from_bytes(beginning, "little")
        if len(beginning) < 8 or header_bytes > min(size, MAX_HEADER_BYTES):
            raise _unusable(path, _what_else(beginning))
        header_text = file.read(header_bytes)
    if len(header_text) < header_bytes:
        raise _unusable(path, _what_else(beginning))
    try:
        header = json.loads(header_text)
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise _unusable(path, "is not a safetensors file (its header is not JSON)") from None
    if not isinstance(header, dict):
        raise _unusable(path, "is not a safetensors file (its header is not an object)")
    metadata = header.pop("__metadata__", {}) or {}
    stored = {name: _place(path, name, entry, 8 + header_bytes) for name, entry in header.items()}
    needed = max((place.end for place in stored.values()), default=8 + header_bytes)
    if size < needed:
        raise _unusable(path, f"is truncated: {size} of {needed} bytes are there; download it again")
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return Checkpoint(path=str(path), metadata=metadata, stored=stored, bytes_of_file=mapped)


def _what_else(beginning: bytes) -> str:
    """What a file is whose first eight bytes are no header length."""
    if PICKLE_BEGINS.match(beginning):
        return "is a pickle (.ckpt, .pt), which can run code when opened; use the .safetensors version of this model"
    if beginning[:4] == b"GGUF":
        return "is a GGUF file; use the .safetensors version of this model"
    if beginning[:1] == b"<" and any(beginning[4:]):
        return "is a web page, not a model: a download went wrong"
    if beginning == b"version ":
        return "is a Git LFS pointer, not the model itself"
    if len(beginning) < 8 or int.from_bytes(beginning, "little") <= MAX_HEADER_BYTES:
        return "is truncated: its header is not all there; download it again"
    return "is not a safetensors file (its first eight bytes are no header length)"


def _place(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (start, end) = DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _unusable(path, f"has a tensor this engine cannot read: {name}") from None
    if end - start != math.prod(shape) * dtype.itemsize or start < 0:
        raise _unusable(path, f"is damaged: {name} has {end - start} bytes for shape {list(shape)}")
    return StoredTensor(dtype=dtype, shape=shape, start=data_start + start, end=data_start + end)


def _unusable(path: Path, reason: str) -> ModelFileUnusable:
    return ModelFileUnusable(f"{path.name} {reason}", file=path.name)
