"""Where a graph expects a file, and what stands there. Pure.

Only inputs that name a file are looked at: those of the loaders below, those whose node type is called "Load…" and
whose input has a file's name, and those that the engine's own description marks as uploads. A prompt that holds a URL,
or a node's title, is text and stays text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from comfyfleet.wire.errors import WorkflowRefused
from comfyfleet.wire.workflow import Graph, is_link

_KNOWN: Mapping[str, frozenset[str]] = {
    "LoadImage": frozenset({"image"}),
    "LoadImageMask": frozenset({"image"}),
    "LoadImageOutput": frozenset({"image"}),
    "LoadAudio": frozenset({"audio"}),
    "LoadVideo": frozenset({"file"}),
    "LoadLatent": frozenset({"latent"}),
    "Load3D": frozenset({"model_file"}),
    "Load3DAnimation": frozenset({"model_file"}),
    "VHS_LoadVideo": frozenset({"video"}),
    "VHS_LoadVideoPath": frozenset({"video"}),
    "VHS_LoadVideoFFmpeg": frozenset({"video"}),
    "VHS_LoadVideoFFmpegPath": frozenset({"video"}),
    "VHS_LoadAudio": frozenset({"audio_file"}),
    "VHS_LoadAudioUpload": frozenset({"audio"}),
    "VHS_LoadImagePath": frozenset({"image"}),
}
_FILE_NAMES = frozenset({"image", "mask", "audio", "video", "file", "latent", "model_file", "audio_file", "image_path"})
_NONE: frozenset[str] = frozenset()
_URLS, _DATA = ("http://", "https://", "s3://"), ("data:",)
_SCHEMES = (*_URLS, *_DATA)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# They say where a message goes and how long it is.
_FETCHERS_OWN = frozenset(
    {"host", "connection", "content-length", "transfer-encoding", "te", "trailer", "upgrade", "expect", "range"}
)
_UPLOAD_MARKS = ("image_upload", "audio_upload", "video_upload", "file_upload", "animated_image_upload")


@dataclass(frozen=True, kw_only=True)
class FileReference:
    """What stands where a file is expected. Exactly one of `url`, `data` (a data URI) and `encoded` (base64) is set."""

    node_id: str
    class_type: str
    input: str
    url: str = field(default="", repr=False)
    data: str = field(default="", repr=False)
    encoded: str = field(default="", repr=False)
    filename: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def refused(self, message: str, **details: Any) -> WorkflowRefused:
        """An error that names the place."""
        return WorkflowRefused(
            f"node {self.node_id} ({self.class_type}), input {self.input}: {message}",
            node_id=self.node_id,
            class_type=self.class_type,
            input=self.input,
            **details,
        )


def upload_inputs(object_info: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """The inputs that an engine's `/object_info` marks as uploads, by node type."""
    found: dict[str, frozenset[str]] = {}
    for class_type, info in object_info.items():
        sections = info.get("input", {}) if isinstance(info, Mapping) else {}
        names = set()
        for section in sections.values() if isinstance(sections, Mapping) else ():
            for name, spec in section.items() if isinstance(section, Mapping) else ():
                options = spec[1] if isinstance(spec, list) and len(spec) > 1 else None
                if isinstance(options, Mapping) and any(options.get(mark) for mark in _UPLOAD_MARKS):
                    names.add(name)
        if names:
            found[class_type] = frozenset(names)
    return found


def only_engine_knows(graph: Graph) -> bool:
    """Does something that looks like a file stand where only the engine can tell whether it takes one?"""
    return any(
        value.lstrip()[:8].lower().startswith(_SCHEMES)
        if isinstance(value, str)
        else isinstance(value, Mapping) and ("url" in value or "base64" in value)
        for node in graph.values()
        for name, value in node["inputs"].items()
        if name not in _known_files(node["class_type"])
    )


def file_references(graph: Graph, uploads: Mapping[str, frozenset[str]] | None = None) -> list[FileReference]:
    """Everything to fetch, in the graph's order. Raises WorkflowRefused for a path that leaves the input folder."""
    return [
        reference
        for node_id, node in graph.items()
        for name, value in _file_inputs(node, uploads)
        if not is_link(value)
        for reference in _references(FileReference(node_id=node_id, class_type=node["class_type"], input=name), value)
    ]


def plain_names(graph: Graph, uploads: Mapping[str, frozenset[str]] | None = None) -> Iterator[str]:
    """The plain file names that a graph's loaders are given; call after `file_references` has let them through."""
    for node in graph.values():
        for _, value in _file_inputs(node, uploads):
            if isinstance(value, str):
                yield value


def _file_inputs(node: Mapping[str, Any], uploads: Mapping[str, frozenset[str]] | None) -> list[tuple[str, object]]:
    """(name, value) of the inputs that take a file; most nodes have none."""
    expected = _known_files(node["class_type"])
    if uploads:
        expected |= uploads.get(node["class_type"], _NONE)
    return [(name, value) for name, value in node["inputs"].items() if name in expected] if expected else []


def _known_files(class_type: str) -> frozenset[str]:
    """Names of a node type's inputs that take a file, as far as names tell."""
    known = _KNOWN.get(class_type, _NONE)
    lower = class_type.lower()
    return known | _FILE_NAMES if "load" in lower and "base64" not in lower else known


def _references(place: FileReference, value: object) -> Iterator[FileReference]:
    if isinstance(value, Mapping):
        yield _explicit(place, value)
    elif isinstance(value, str):
        text = value.strip()
        scheme = text[:8].lower()
        if scheme.startswith(_URLS):
            yield replace(place, url=text)
        elif scheme.startswith(_DATA):
            yield replace(place, data=text)
        elif reason := unfit_name(value):
            raise place.refused(reason, reason="path")


def _explicit(place: FileReference, value: Mapping[str, Any]) -> FileReference:
    """`{url, headers?, filename?}`, or `{base64, filename?}`: the field that says it is base64."""
    url, encoded, filename = value.get("url", ""), value.get("base64", ""), value.get("filename", "")
    headers = value.get("headers", {})
    is_text = all(isinstance(text, str) for text in (url, encoded, filename))
    if not is_text or bool(url) == bool(encoded):
        raise place.refused("an object here must be {url, headers?, filename?} or {base64, filename?}")
    if not isinstance(headers, Mapping) or not all(isinstance(text, str) for text in headers.values()):
        raise place.refused("headers must be an object of texts")
    if reason := unfit_headers(headers):
        raise place.refused(reason)
    if url and not url.lower().startswith(("http://", "https://", "s3://")):
        raise place.refused("url must begin with http://, https:// or s3://")
    return replace(
        place,
        url=url,
        encoded=encoded,
        filename=filename,
        headers={str(name): text for name, text in headers.items()},
    )


def unfit_headers(headers: Mapping[str, str]) -> str | None:
    """Why a caller's headers must not be sent with a fetch, or None. Never their values, which are secret."""
    for name, text in headers.items():
        if not _HEADER_NAME.fullmatch(name):
            return "headers: a name holds what no header's name may hold"
        if any(letter in text for letter in "\r\n\0"):
            return f"headers: the value of {name} holds a line break or a zero byte"
        if name.lower() in _FETCHERS_OWN:
            return f"headers: {name} is not the caller's to set"
    return None


def unfit_name(name: str) -> str | None:
    """Why a plain name must not reach the engine (it would read any file of its machine), or None."""
    text = name.replace("\\", "/")
    if "\0" in text:
        return "a file name holds a zero byte"
    if text.startswith(("/", "~")) or (len(text) > 1 and text[1] == ":"):
        return "an absolute path is not taken; upload the file or give a URL"
    if ".." in text.split("/"):
        return "a path must not leave the input folder"
    if "://" in text:
        return "only http, https, s3 and data URLs are taken"
    return None


def with_names(graph: Graph, names: Iterable[tuple[FileReference, str]]) -> Graph:
    """A new graph in which each reference is the file's name in the engine's input folder."""
    rebuilt = {node_id: {**node, "inputs": dict(node["inputs"])} for node_id, node in graph.items()}
    for reference, name in names:
        rebuilt[reference.node_id]["inputs"][reference.input] = name
    return rebuilt
