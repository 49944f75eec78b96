"""A template: what a worker needs on disk, as declarative TOML shipped with the package or given as a file.

Parsed once into frozen values; a wrong file is refused naming the field. The hash of a template's content is what a
workergroup's `template_hash` names; its plain name works as well.
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
import tomllib
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from comfyfleet.wire.errors import BadRequest, NotFound
from comfyfleet.wire.workflow import Graph, read_graph

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """One file below the models folder. url: http(s):// or hf://owner/repo/path[@revision]; the rest if known."""

    url: str
    folder: str
    name: str
    size_bytes: int | None = None
    sha256: str | None = None

    @property
    def relative_path(self) -> str:
        return f"{self.folder}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class CustomNode:
    """A custom node's repository at one commit."""

    repository: str
    commit: str


@dataclass(frozen=True, kw_only=True)
class Template:
    """gpu_ram_gb: what the template needs. benchmark: the graph file's name, shipped or beside the TOML.

    benchmark_limit_s: how long measured rounds may take in all while their median is not yet stable.
    """

    name: str
    hash_id: str
    description: str
    gpu_ram_gb: float
    miniatures: bool
    comfyui_version: str
    benchmark: str
    benchmark_limit_s: float = 600.0
    models: tuple[ModelFile, ...] = ()
    custom_nodes: tuple[CustomNode, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None

    def docker_flags(self) -> str:
        """The environment as a control plane's template has it."""
        return " ".join(f"-e {shlex.quote(f'{name}={value}')}" for name, value in self.environment.items())

    def benchmark_graph(self) -> Graph | None:
        """The benchmark's graph, or None where the template has none. Raises BadRequest or WorkflowRefused."""
        if not self.benchmark:
            return None
        graphs = _shipped() / "graphs" if self.folder is None else self.folder
        try:
            content = (graphs / self.benchmark).read_bytes()
        except OSError as problem:
            raise BadRequest(f"benchmark {self.benchmark}: {problem.strerror}", field="benchmark") from problem
        return read_graph(content, field=self.benchmark)


def _shipped() -> Any:
    return resources.files("comfyfleet.provision") / "templates"


def shipped_templates() -> list[Template]:
    """Every template of the package, by name."""
    files = sorted((entry for entry in _shipped().iterdir() if entry.name.endswith(".toml")), key=lambda e: str(e.name))
    return [parse_template(entry.read_bytes(), name=entry.name.removesuffix(".toml")) for entry in files]


def find_template(name_or_hash: str) -> Template:
    """By name, hash or path of a TOML file; raises NotFound naming what there is."""
    if name_or_hash.endswith(".toml"):
        path = Path(name_or_hash)
        if not path.is_file():
            raise NotFound(f"there is no template file {name_or_hash}", template=name_or_hash)
        return parse_template(path.read_bytes(), name=path.stem, folder=path.parent)
    known = shipped_templates()
    for template in known:
        if name_or_hash in (template.name, template.hash_id):
            return template
    names = ", ".join(template.name for template in known)
    raise NotFound(f"there is no template {name_or_hash!r}; there are {names}", template=name_or_hash)


def parse_template(content: bytes, *, name: str, folder: Path | None = None) -> Template:
    """The template in `content`; raises BadRequest naming the field."""
    if not _NAME.fullmatch(name):
        raise BadRequest(f"{name!r} is no template name", field="name")
    try:
        data = tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"template {name} is not valid TOML: {error}", field=name) from error
    unknown = set(data) - {
        "description",
        "gpu_ram_gb",
        "miniatures",
        "comfyui_version",
        "benchmark",
        "benchmark_limit_s",
        "models",
        "custom_nodes",
        "environment",
    }
    if unknown:
        raise BadRequest(f"template {name}: unknown field {min(unknown)}", field=min(unknown))
    environment = _of(data, "environment", dict, {})
    for variable in environment:
        _of(environment, variable, (str, int, float), "", "environment.")
    return Template(
        name=name,
        hash_id=hashlib.sha256(content).hexdigest()[:32],
        description=_of(data, "description", str, ""),
        gpu_ram_gb=_amount(data, "gpu_ram_gb", 0.0),
        miniatures=_of(data, "miniatures", bool, False),
        comfyui_version=_of(data, "comfyui_version", str, ""),
        benchmark=_of(data, "benchmark", str, ""),
        benchmark_limit_s=_amount(data, "benchmark_limit_s", 600.0),
        models=_without_twins(
            tuple(_model(entry, number) for number, entry in enumerate(_of(data, "models", list, [])))
        ),
        custom_nodes=tuple(_node(entry, number) for number, entry in enumerate(_of(data, "custom_nodes", list, []))),
        environment={str(key): str(value) for key, value in environment.items()},
        folder=folder,
    )


def _of(data: Mapping[str, Any], key: str, kind: Any, default: Any, where: str = "") -> Any:
    value = data.get(key, default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BadRequest(f"{where}{key} has the wrong type", field=f"{where}{key}")
    return value


def _only(entry: Mapping[str, Any], where: str, known: Set[str]) -> None:
    """A digest under a misspelt name would never be checked."""
    if unknown := set(entry) - known:
        name = f"{where}{min(unknown)}"
        raise BadRequest(f"unknown field {name}; there are {', '.join(sorted(known))}", field=name)


def _amount(data: Mapping[str, Any], key: str, default: float) -> float:
    value = float(_of(data, key, (int, float), default))
    if not math.isfinite(value) or value < 0:  # TOML knows nan and inf
        raise BadRequest(f"{key} must be a number from 0 on", field=key)
    return value


def _model(entry: Any, number: int) -> ModelFile:
    where = f"models[{number}]."
    if not isinstance(entry, Mapping):
        raise BadRequest(f"models[{number}] must be a table", field=f"models[{number}]")
    _only(entry, where, {"url", "folder", "name", "size_bytes", "sha256"})
    url, folder = _of(entry, "url", str, "", where), _of(entry, "folder", str, "", where)
    if not url.startswith(("https://", "http://", "hf://")) or not _is_url(url):
        raise BadRequest(f"{where}url must be http(s):// or hf://", field=f"{where}url")
    name = _of(entry, "name", str, "", where) or url.partition("?")[0].rsplit("/", 1)[-1].partition("@")[0]
    for field_name, value in (("folder", folder), ("name", name)):
        is_plain = value.isprintable() and "\\" not in value
        if not is_plain or any(part in ("", ".", "..") for part in value.split("/")):
            raise BadRequest(f"{where}{field_name} must stay inside the models folder", field=f"{where}{field_name}")
    sha256 = _of(entry, "sha256", str, "", where).lower()
    if sha256 and not _SHA256.fullmatch(sha256):
        raise BadRequest(f"{where}sha256 is not 64 hexadecimal digits", field=f"{where}sha256")
    size_bytes = _of(entry, "size_bytes", int, 0, where)
    if size_bytes < 0:
        raise BadRequest(f"{where}size_bytes must not be negative", field=f"{where}size_bytes")
    return ModelFile(url=url, folder=folder, name=name, size_bytes=size_bytes or None, sha256=sha256 or None)


def _is_url(text: str) -> bool:
    try:
        parsed = urlsplit(text)
        return bool(parsed.hostname) and (parsed.port is None or parsed.port > 0)
    except ValueError:
        return False


def _without_twins(models: tuple[ModelFile, ...]) -> tuple[ModelFile, ...]:
    """Raises BadRequest for two entries with one place: which of the two came last would be chance."""
    seen: dict[str, int] = {}
    for number, model in enumerate(models):
        if (first := seen.setdefault(model.relative_path, number)) != number:
            raise BadRequest(f"models[{number}] has the place of models[{first}]", field=f"models[{number}].name")
    return models


def _node(entry: Any, number: int) -> CustomNode:
    where = f"custom_nodes[{number}]."
    if not isinstance(entry, Mapping):
        raise BadRequest(f"custom_nodes[{number}] must be a table", field=f"custom_nodes[{number}]")
    _only(entry, where, {"repository", "commit"})
    repository, commit = _of(entry, "repository", str, "", where), _of(entry, "commit", str, "", where)
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise BadRequest(f"{where}commit must be a full commit id: a branch moves", field=f"{where}commit")
    return CustomNode(repository=repository, commit=commit)
