"""Node declarations: one function and one declaration make a node; `object_info` is derived from them.

A declaration says what ComfyUI's `INPUT_TYPES` says (kinds, defaults, limits, lists), so the checker, the executor and
the description given to clients can never disagree. This module holds no node; those live in `nodes/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec


class Interrupted(Exception):
    """The run was stopped by its owner; raised by `NodeRun.progress` and between nodes."""


# What a node function returns: its outputs in order, or, for an output node, what a client is shown as well.


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Result of a node with something to show: `ui` is ComfyUI's ui dictionary ({"images": [{filename, …}]})."""

    ui: Mapping[str, Sequence[Any]]
    outputs: tuple[Any, ...] = ()


class Folders(Protocol):
    """Where a run finds and puts files. Paths out of these folders do not exist for a graph."""

    def model_names(self, folder: str) -> list[str]:
        """Names in a model folder ("checkpoints", "vae", …), sorted; a real file hides a miniature."""
        ...

    def model_path(self, folder: str, name: str) -> str:
        """Raises FileNotFoundError."""
        ...

    def is_miniature(self, folder: str, name: str) -> bool: ...

    def input_names(self, media: str) -> list[str]:
        """Input files of a medium ("image", "audio", "video", "latent"), by extension, sorted."""
        ...

    def has_input(self, name: str) -> bool: ...

    def input_path(self, name: str) -> str:
        """The path of an input file, "name", "sub/name" or "name [output]". Raises FileNotFoundError."""
        ...

    def scratch_path(self) -> str:
        """A path that nobody else has, for a file of the node's own."""
        ...

    def temp_suffix(self) -> str:
        """`_temp_` and five letters: what a preview's name has after its prefix."""
        ...

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
        """Reserve the next `<prefix>_00001_.<extension>` as ComfyUI names files; `kind` is "output" or "temp"."""
        ...


@dataclass(frozen=True, kw_only=True)
class OutputName:
    """A file about to be written to `staging_path`; `NodeRun.commit` names it, so no half-written file has its name."""

    staging_path: str
    path: str
    filename: str
    subfolder: str
    kind: str

    def shown(self) -> dict[str, str]:
        return {"filename": self.filename, "subfolder": self.subfolder, "type": self.kind}


class NodeRun(Protocol):
    """What a running node may ask of its surroundings."""

    node_id: str
    folders: Folders
    prompt: Mapping[str, Any]  # the validated API graph, for file metadata
    extra_pnginfo: Mapping[str, Any]
    device: str  # where models compute: "cpu", "cuda:0"

    def progress(self, value: int, maximum: int, preview: Callable[[], Any] | None = None) -> None:
        """Tell a step; raises Interrupted when the run was stopped. `preview` makes a small IMAGE if one is wanted."""
        ...

    def send_picture(self, value: int, maximum: int, frame: Any) -> None:
        """A step that brings a whole picture (H, W, 3) to whoever listens, as PNG."""
        ...

    def check_stop(self) -> None:
        """Raises Interrupted when the run was stopped; for long work that tells no steps."""
        ...

    def commit(self, output: OutputName) -> None:
        """Give a finished staging file its final name, atomically."""
        ...


class ModelFiles(msgspec.Struct, frozen=True, tag="model_files"):
    """Options of an input that names a model file: `ModelFiles("vae")` lists what lies in that model folder now.

    A loader's cached result is dropped when the file behind the name changes, and a run that used a miniature is
    marked: both follow from this declaration, no node has to say so.
    """

    folder: str
    built_in: tuple[str, ...] = ()  # names that are no files: the engine has what they mean


class InputFiles(msgspec.Struct, frozen=True, tag="input_files"):
    """Options of an input that names a file in the input folder; `media` is "image", "audio", "video" or "latent".

    Any existing file below the input folder passes, listed or not ("sub/name.png"); `refusal` is what is said of a
    missing one. The file's digest joins the cache signature.
    """

    media: str
    refusal: str = "Invalid file: {}"


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input: `kind` is a link type ("MODEL"), a widget type ("INT", …) or "COMBO" with `options`.

    `options` is a fixed list, or ModelFiles or InputFiles for lists of files. `details` goes to object_info as it is
    (step, round, multiline, tooltip …); `minimum`/`maximum` are checked and shown as min and max.
    """

    kind: str
    required: bool = True
    default: Any = None
    minimum: int | float | None = None
    maximum: int | float | None = None
    options: tuple[Any, ...] | ModelFiles | InputFiles | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


def link(kind: str, *, required: bool = True, **details: Any) -> Input:
    return Input(kind=kind, required=required, details=details)


def integer(
    default: int = 0, minimum: int = 0, maximum: int = 2**31 - 1, *, required: bool = True, **details: Any
) -> Input:
    return Input(kind="INT", required=required, default=default, minimum=minimum, maximum=maximum, details=details)


def real(
    default: float = 0.0, minimum: float = 0.0, maximum: float = 1.0, *, required: bool = True, **details: Any
) -> Input:
    return Input(kind="FLOAT", required=required, default=default, minimum=minimum, maximum=maximum, details=details)


def text(default: str = "", *, required: bool = True, **details: Any) -> Input:
    return Input(kind="STRING", required=required, default=default, details=details)


def boolean(default: bool = False, *, required: bool = True, **details: Any) -> Input:
    return Input(kind="BOOLEAN", required=required, default=default, details=details)


def choice(
    options: Sequence[Any] | ModelFiles | InputFiles,
    *,
    default: Any = None,
    required: bool = True,
    **details: Any,
) -> Input:
    listed = options if isinstance(options, ModelFiles | InputFiles) else tuple(options)
    return Input(kind="COMBO", required=required, default=default, options=listed, details=details)


NodeFunction = Callable[..., "tuple[Any, ...] | Shown"]


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What is known of a node without its code: plain data, so a process without torch can check graphs.

    `outputs` are link types; `is_output` marks where a run may end; `hidden` are ComfyUI's hidden inputs as shown in
    object_info (the metadata of a save node).
    """

    name: str
    inputs: Mapping[str, Input]
    outputs: tuple[str, ...]
    output_names: tuple[str, ...]
    category: str
    display_name: str
    description: str = ""
    is_output: bool = False
    is_volatile: bool = False  # runs each time: what it does is not in its result
    hidden: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A declared node and its function `f(run: NodeRun, *, <inputs by name>)`."""

    declaration: Declaration
    function: NodeFunction


METADATA = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}


class NodeRegistry:
    """Nodes by class_type. Names are unique."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}

    def __getitem__(self, name: str) -> Node:
        return self._nodes[name]

    def get(self, name: str) -> Node | None:
        return self._nodes.get(name)

    def names(self) -> list[str]:
        return sorted(self._nodes)

    def declarations(self) -> dict[str, Declaration]:
        return {name: self._nodes[name].declaration for name in self.names()}

    def add(self, node: Node) -> None:
        name = node.declaration.name
        if name in self._nodes:
            raise ValueError(f"node {name} is declared twice")
        self._nodes[name] = node

    def add_all(self, other: NodeRegistry) -> None:
        for name in other.names():
            self.add(other[name])

    def node(
        self,
        name: str,
        *,
        inputs: Mapping[str, Input],
        outputs: Sequence[str] = (),
        output_names: Sequence[str] = (),
        category: str = "",
        display_name: str = "",
        description: str = "",
        is_output: bool = False,
        is_volatile: bool = False,
        hidden: Mapping[str, str] | None = None,
    ) -> Callable[[NodeFunction], NodeFunction]:
        """Declare the decorated function `f(run: NodeRun, *, <inputs by name>)` as node `name`."""
        declaration = Declaration(
            name=name,
            inputs=inputs,
            outputs=tuple(outputs),
            output_names=tuple(output_names) or tuple(outputs),
            category=category,
            display_name=display_name or name,
            description=description,
            is_output=is_output,
            is_volatile=is_volatile,
            hidden=hidden or {},
        )

        def declare(function: NodeFunction) -> NodeFunction:
            self.add(Node(declaration=declaration, function=function))
            return function

        return declare
