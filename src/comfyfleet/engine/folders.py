"""The folders of an engine: models (real ones first, miniatures after), inputs, outputs, temporary files.

Names from a graph never lead out of their folder. An output is written under a staging name and renamed when it is
complete, so no half-written file ever has its final name.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import shutil
import string
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from comfyfleet.clock import Clock
from comfyfleet.engine.naming import file_name, fill_tokens, next_counter, split_prefix
from comfyfleet.engine.registry import OutputName
from comfyfleet.ids import Ids

MODEL_EXTENSIONS = {".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"}
# Kinds as `GET /models` lists them; all but two have a folder of their own name.
MODEL_FOLDERS: dict[str, tuple[str, ...]] = {
    kind: (kind,)
    for kind in (
        "checkpoints", "configs", "loras", "vae", "text_encoders", "diffusion_models", "clip_vision", "style_models",
        "embeddings", "diffusers", "vae_approx", "controlnet", "gligen", "upscale_models", "custom_nodes",
        "hypernetworks", "photomaker", "classifiers", "model_patches", "audio_encoders",
    )
} | {"text_encoders": ("text_encoders", "clip"), "diffusion_models": ("unet", "diffusion_models")}  # fmt: skip
MEDIA_EXTENSIONS: dict[str, set[str]] = {
    "image": {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"},
    "audio": {".mp3", ".wav", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".mp4", ".mkv", ".webm", ".mov"},
    "video": {".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif"},
    "latent": {".latent"},
}
STAGING = ".staging"
LETTERS = string.ascii_lowercase


@dataclass(frozen=True, kw_only=True)
class FolderPaths:
    """Where the folders are; absolute."""

    models: Path
    miniatures: Path
    input: Path
    output: Path
    temp: Path
    user: Path  # what an editor keeps

    def root(self, kind: str) -> Path:
        """The folder of a file type: "input", "output" or "temp". Raises KeyError."""
        return {"input": self.input, "output": self.output, "temp": self.temp}[kind]


class EngineFolders:
    """The files of one engine. Made once per process; each run writes through its own `for_run`."""

    def __init__(self, paths: FolderPaths, clock: Clock, ids: Ids) -> None:
        self.paths = paths
        self._clock = clock
        self._last_counter = 0
        self._temp_suffix = "_temp_" + "".join(LETTERS[ids.random_int() % len(LETTERS)] for _ in range(5))
        self._digests: dict[str, str] = {}
        self._staged = itertools.count(1)
        self._unfinished: dict[str, str] = {}  # final path by staging path
        self._naming = threading.Lock()
        self._reserved: set[str] = set()  # final paths that a run is writing to now
        for folder in (paths.input, paths.output, paths.temp):
            folder.mkdir(parents=True, exist_ok=True)

    def for_run(self) -> EngineFolders:
        """The same folders for one run, which leaves only its own files unfinished; runs never take the same name."""
        mine = copy.copy(self)
        mine._last_counter, mine._unfinished = 0, {}
        return mine

    def sweep(self) -> None:
        """At start: forget what a killed engine had in hand, and empty the temporary folder."""
        for folder in (self.paths.output, self.paths.temp):
            shutil.rmtree(folder / STAGING, ignore_errors=True)
        for entry in self.paths.temp.iterdir():
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)

    # Models

    def model_names(self, folder: str) -> list[str]:
        names: set[str] = set()
        for root in self.model_roots(folder):
            names.update(_names_below(root, MODEL_EXTENSIONS))
        return sorted(names)

    def model_path(self, folder: str, name: str) -> str:
        for root in self.model_roots(folder):
            if (path := _inside(root, name)) is not None and path.is_file():
                return str(path)
        raise FileNotFoundError(f"there is no file {name} in the models folder {folder}")

    def is_miniature(self, folder: str, name: str) -> bool:
        """True for a file from the miniatures folder, and for one whose own metadata says so."""
        path = Path(self.model_path(folder, name))
        return path.is_relative_to(self.paths.miniatures) or read_metadata(path).get("miniature") == "true"

    def model_roots(self, folder: str) -> list[Path]:
        parts = MODEL_FOLDERS.get(folder, (folder,))
        return [root / part for root in (self.paths.models, self.paths.miniatures) for part in parts]

    # Inputs

    def input_names(self, media: str) -> list[str]:
        extensions = MEDIA_EXTENSIONS[media]
        return sorted(entry.name for entry in self.paths.input.iterdir() if entry.suffix.lower() in extensions)

    def has_input(self, name: str) -> bool:
        return self._find_input(name) is not None

    def input_path(self, name: str) -> str:
        path = self._find_input(name)
        if path is None:
            raise FileNotFoundError(f"there is no input file {name}")
        return str(path)

    def _find_input(self, name: str) -> Path | None:
        root = self.paths.input
        for kind in ("input", "output", "temp"):
            if name.endswith(f"[{kind}]"):
                root, name = self.paths.root(kind), name[: -len(kind) - 2].rstrip()
        path = _inside(root, name)
        return path if path is not None and path.is_file() else None

    # What stands behind a name

    def state_of(self, path: str) -> str:
        """Changes when the file does, without reading it: for files of gigabytes."""
        status = os.stat(path)
        return f"{path}:{status.st_size}:{status.st_mtime_ns}"

    def digest_of(self, path: str) -> str:
        """The file's SHA-256; read again only when the file changed."""
        state = self.state_of(path)
        if state not in self._digests:
            with open(path, "rb") as file:
                self._digests[state] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._digests[state]

    # Outputs

    def temp_suffix(self) -> str:
        """`_temp_` and five letters, one suffix for as long as this process lives."""
        return self._temp_suffix

    def next_output(
        self,
        prefix: str,
        extension: str,
        *,
        kind: str = "output",
        width: int = 0,
        height: int = 0,
        batch_number: int = 0,
    ) -> OutputName:
        now = datetime.fromtimestamp(self._clock.now())  # noqa: DTZ006 - ComfyUI names files by local time
        subfolder, name, matched = split_prefix(fill_tokens(prefix, width=width, height=height, now=now))
        root = self.paths.root(kind)
        folder = root / subfolder
        if not folder.resolve().is_relative_to(root.resolve()):
            raise PermissionError(f"saving outside the output folder is not allowed: {prefix}")
        folder.mkdir(parents=True, exist_ok=True)
        staging = root / STAGING
        staging.mkdir(exist_ok=True)
        staging_path = str(staging / f"{os.getpid()}-{next(self._staged)}.{extension}")
        with self._naming:
            # A batch lists the folder once; its later files go on counting, past what another run saved meanwhile.
            if batch_number == 0:
                counter = next_counter(self._listing(folder), name, matched)
            else:
                counter = self._last_counter + 1
            may_overwrite = batch_number == 0 or matched != len(name) or "%batch_num%" in name
            while self._is_taken(
                path := folder / file_name(name, counter, extension, batch_number), may_overwrite=may_overwrite
            ):
                counter += 1
            self._last_counter, filename = counter, path.name
            self._reserved.add(str(path))
            self._unfinished[staging_path] = str(path)
        return OutputName(
            staging_path=staging_path,
            path=str(folder / filename),
            filename=filename,
            subfolder=subfolder,
            kind=kind,
        )

    def _listing(self, folder: Path) -> list[str]:
        """What is in a folder, and what is about to be."""
        return os.listdir(folder) + [os.path.basename(path) for path in self._reserved if Path(path).parent == folder]

    def _is_taken(self, path: Path, *, may_overwrite: bool) -> bool:
        return str(path) in self._reserved or (not may_overwrite and path.exists())

    def scratch_path(self) -> str:
        """A path for a file that its user removes at once; what a killed process leaves goes at the next start."""
        staging = self.paths.temp / STAGING
        staging.mkdir(exist_ok=True)
        return str(staging / f"{os.getpid()}-{next(self._staged)}.raw")

    def commit(self, output: OutputName) -> None:
        """Give a finished staging file its final name, atomically."""
        os.replace(output.staging_path, output.path)
        self._release(output.staging_path)

    def _release(self, staging_path: str) -> None:
        with self._naming:
            self._reserved.discard(self._unfinished.pop(staging_path, ""))

    def discard_unfinished(self) -> None:
        """Remove what a failed or stopped node left half written."""
        for path in list(self._unfinished):
            Path(path).unlink(missing_ok=True)
            self._release(path)


def _names_below(root: Path, extensions: set[str]) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if os.path.splitext(name)[1].lower() in extensions:
                yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def _inside(root: Path, name: str) -> Path | None:
    """The path of `name` below `root`, or None when it would lead out of it."""
    if not name or "\0" in name or os.path.isabs(name):
        return None
    clean = os.path.normpath(name)
    if clean == ".." or clean.startswith(".." + os.sep):
        return None
    return root / clean


def read_metadata(path: Path) -> dict[str, str]:
    """`__metadata__` of a safetensors file; {} for any other file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= 100_000_000:
                return {}
            header = json.loads(file.read(length))
    except (OSError, ValueError):
        return {}
    found = header.get("__metadata__") if isinstance(header, dict) else None
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
