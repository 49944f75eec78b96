"""What a history entry names: every file under every key, and text lists.

ComfyUI's nodes put what they made under any key they like (`images` holds videos too); a file is an object with a
`filename`. Everything here comes from custom nodes and is believed only after `located` has contained it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from comfyfleet.wire.workflow import Graph
from comfyfleet.worker.engines.client import HistoryEntry

_PATH_LISTS = frozenset({"result", "3d"})  # 3D previews name a file by its path alone
_MODEL_SUFFIXES = frozenset({".glb", ".gltf", ".obj", ".fbx", ".stl", ".ply", ".usdz"})
_MAX_FILES = 5000
_MAX_NESTING = 5
_MAX_FOLDERS = 16


@dataclass(frozen=True, kw_only=True)
class NamedFile:
    """One thing that a node made. Either a file name, or `text` (then `filename` is ours)."""

    node_id: str
    output_type: str
    filename: str
    subfolder: str = ""
    type: str = "output"
    text: str | None = None

    @property
    def as_named(self) -> str:
        """`<subfolder>/<filename>`, letter for letter."""
        return f"{self.subfolder}/{self.filename}" if self.subfolder else self.filename

    @cached_property
    def path(self) -> str | None:
        """The same as a plain relative path, or None for one that tries to leave its folder."""
        return _plain_path(self.as_named)


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a prompt made. is_in_place: a save node's prefix makes ComfyUI write the same names again, over the bytes of
    earlier files."""

    files: tuple[NamedFile, ...]
    is_in_place: bool


def read_made(entry: HistoryEntry) -> Made:
    """What a history entry names."""
    graph = entry.prompt[2] if len(entry.prompt) > 2 else None
    return Made(files=_named_files(entry.outputs), is_in_place=_writes_in_place(graph))


def _named_files(outputs: Mapping[str, object]) -> tuple[NamedFile, ...]:
    """Every file and text, in their order; a file named twice by one node under one key once."""
    found: dict[tuple[str, str, str, str, str], NamedFile] = {}
    for node_id, ui in outputs.items():
        if not isinstance(ui, dict):
            continue
        for key, value in ui.items():
            for named in _of_key(node_id, key, value):
                found.setdefault((named.node_id, key, named.type, named.subfolder, named.filename), named)
                if len(found) >= _MAX_FILES:
                    return tuple(found.values())
    return tuple(found.values())


def _plain_path(text: str) -> str | None:
    """A backslash separates here, as the author of a prefix from Windows (`video\\film`) meant it; what is no visible
    letter would break links and headers."""
    if "\0" in text:
        return None
    if not text.isprintable():
        text = "".join(letter if letter >= " " and letter != "\x7f" else "_" for letter in text)
    text = text.replace("\\", "/")
    if text.startswith("/") or (len(text) > 1 and text[1] == ":"):
        return None
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or len(text.encode()) > 700:
        return None
    return "/".join(parts)


def _of_key(node_id: str, key: str, value: object) -> Iterator[NamedFile]:
    for index, item in enumerate(_flat(value)):
        if isinstance(item, dict):
            filename = item.get("filename")
            if isinstance(filename, str) and filename:
                subfolder, kind = item.get("subfolder"), item.get("type")
                yield NamedFile(
                    node_id=node_id,
                    output_type=key,
                    filename=filename,
                    subfolder=subfolder if isinstance(subfolder, str) else "",
                    type=kind if isinstance(kind, str) and kind else "output",
                )
        elif isinstance(item, str) and key == "text":
            safe_id = "".join(letter if letter.isalnum() else "_" for letter in node_id)[:64]
            yield NamedFile(node_id=node_id, output_type=key, filename=f"text_{safe_id}_{index}.txt", text=item)
        elif isinstance(item, str) and key in _PATH_LISTS:
            path = PurePosixPath(item)
            if path.suffix.lower() in _MODEL_SUFFIXES:
                folder = "" if path.parent == PurePosixPath(".") else str(path.parent)
                yield NamedFile(node_id=node_id, output_type=key, filename=path.name, subfolder=folder)


def _flat(value: object, depth: int = 0) -> Iterator[object]:
    """What stands in a list, and in lists within it: some nodes give a list for each item of a batch."""
    if not isinstance(value, list):
        yield value
    elif depth < _MAX_NESTING:
        for inner in value:
            yield from _flat(inner, depth + 1)


def located(named: NamedFile, folders: Mapping[str, Path]) -> str | None:
    """Where the file should be, if its name stays inside the folder of its type. Links are followed by the opener.

    A backslash is a letter like others here: that is how an engine on this system wrote it.
    """
    root = folders.get(named.type)
    return None if named.path is None or root is None else os.path.join(root, named.as_named)


def missing_files(files: Iterable[NamedFile], folders: Mapping[str, Path]) -> list[NamedFile]:
    """Files that are gone: a cached answer that must be rendered again. Blocking."""
    gone = []
    for one in files:
        source = located(one, folders)
        if one.text is None and source is not None and not os.path.isfile(source):
            gone.append(one)
    return gone


def _writes_in_place(graph: object) -> bool:
    if not isinstance(graph, dict):
        return True  # we cannot know: copy
    return any(
        isinstance(value, str) and "%batch_num%" in value
        for node in graph.values()
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
        for value in node["inputs"].values()
    )


def expected_folders(graph: Graph) -> set[str]:
    """Sub-folders that a graph's save nodes will very likely write to: those of plain prefixes (`music/song`)."""
    found = set()
    for node in graph.values():
        prefix = node["inputs"].get("filename_prefix")
        if isinstance(prefix, str) and "/" in prefix and "%" not in prefix:
            path = _plain_path(prefix) or ""
            found.add(path.rpartition("/")[0])
    return found - {""} if len(found) <= _MAX_FOLDERS else set()
