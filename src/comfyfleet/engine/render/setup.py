"""What a render process needs to know, shared with `run.py`, which renders in-process."""

from __future__ import annotations

import ctypes
from pathlib import Path

import msgspec

from comfyfleet.clock import Clock
from comfyfleet.engine.folders import EngineFolders, FolderPaths
from comfyfleet.ids import Ids

# Keep freed blocks for the next layer instead of handing them back to the kernel and faulting them in again:
# decoding a film took half the time with this. (glibc's mallopt parameters; other C libraries ignore them.)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 1 << 29


class RenderSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Passed to the child as JSON on its command line. Folders are absolute."""

    models_dir: str
    miniatures_dir: str
    input_dir: str
    output_dir: str
    temp_dir: str
    user_dir: str = ""  # "": beside the input folder
    device: str = "cpu"
    cache_bytes: int = 0  # 0: a share of the machine's memory
    model_bytes: int = 0  # what models may take of the device; 0: most of it
    compiles: bool = False  # fuse kernels on a GPU by compiling; the first job of a size waits for it

    def paths(self) -> FolderPaths:
        return FolderPaths(
            models=Path(self.models_dir),
            miniatures=Path(self.miniatures_dir),
            input=Path(self.input_dir),
            output=Path(self.output_dir),
            temp=Path(self.temp_dir),
            user=Path(self.user_dir) if self.user_dir else Path(self.input_dir).parent / "user",
        )

    def folders(self, clock: Clock, ids: Ids) -> EngineFolders:
        return EngineFolders(self.paths(), clock, ids)


def keep_freed_memory() -> None:
    """Tune the C library's allocator for tensors; harmless where it cannot be tuned."""
    try:
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
    except (OSError, AttributeError):
        return
