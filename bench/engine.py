"""The engine: what the executor costs per node, what encoding costs, and the seeds' graphs cold and from the cache.

Baselines: the same nodes called bare in a loop; the film's and song's own length for the encoders.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bench.figure import Figure
from comfyfleet.clock import SystemClock
from comfyfleet.engine.cache import ResultCache
from comfyfleet.engine.events import Event
from comfyfleet.engine.executor import Executor, Job
from comfyfleet.engine.graph import check_prompt
from comfyfleet.engine.media.film import save_mp4
from comfyfleet.engine.media.sound import save_sound
from comfyfleet.engine.memory import Residency
from comfyfleet.engine.registry import NodeRegistry, NodeRun, Shown, integer, link
from comfyfleet.engine.render.machine import make_executor
from comfyfleet.engine.render.setup import RenderSettings, keep_freed_memory
from comfyfleet.engine.values import Video
from comfyfleet.ids import SystemIds

NODES = 1000
REPEATS = 5
SEEDS = {"ace_step_v1_t2m": 35.0, "wan22_t2v_a14b": 60.0}  # the documents' requests, goal in seconds on two cores
REQUESTS = Path(__file__).parents[1] / "src" / "comfyfleet" / "cli" / "requests"
RATE_HZ, SONG_S = 44100, 180
FILM_FRAMES, FILM_SIDE, FILM_FPS = 81, 640, 16

clock = SystemClock()


def figures() -> list[Figure]:
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        settings = RenderSettings(
            **{f"{name}_dir": f"{folder}/{name}" for name in ("models", "miniatures", "input", "output", "temp")}
        )
        return [*_overhead(settings), *_encoders(Path(folder)), *_seeds(settings)]


def _seconds(work: Callable[[], object]) -> float:
    began = clock.monotonic()
    work()
    return clock.monotonic() - began


def _overhead(settings: RenderSettings) -> list[Figure]:
    registry = NodeRegistry()
    registry.node("Start", inputs={"value": integer(0)}, outputs=["INT"])(_start)
    registry.node("Add", inputs={"a": link("INT"), "b": integer(0)}, outputs=["INT"])(_add)
    registry.node("Show", inputs={"a": link("INT")}, is_output=True)(_show)
    executor = Executor(
        registry=registry,
        folders=settings.folders(clock, SystemIds()),
        cache=ResultCache(1 << 30),
        residency=Residency("cpu", 1 << 40),
        clock=clock,
    )
    first, cached, checks = [], [], []
    for repeat in range(REPEATS):
        graph = {"0": {"class_type": "Start", "inputs": {"value": repeat}}}
        for number in range(1, NODES):
            graph[str(number)] = {"class_type": "Add", "inputs": {"a": [str(number - 1), 0], "b": number}}
        graph["show"] = {"class_type": "Show", "inputs": {"a": [str(NODES - 1), 0]}}
        told: list[Event] = []
        job = Job(prompt_id="p", graph=graph, outputs=["show"], extra_pnginfo={})
        checks.append(_seconds(lambda: check_prompt(graph, registry.declarations(), executor.folders)))  # noqa: B023
        first.append(_seconds(lambda: executor.run(job, told.append, lambda: False)))  # noqa: B023
        cached.append(_seconds(lambda: executor.run(job, told.append, lambda: False)))  # noqa: B023
    bare = _seconds(lambda: [_add(None, a=number, b=1) for number in range(NODES)])
    per_node = 1e6 / (NODES + 1)
    return [
        Figure(
            name="executor, a trivial node of 1,000",
            value=min(first) * per_node,
            unit="µs",
            goal=50.0,
            better="lower",
            baseline=bare * per_node,
        ),
        Figure(
            name="executor, a cached node of 1,000", value=min(cached) * per_node, unit="µs", goal=None, better="lower"
        ),
        Figure(name="graph check, a node of 1,000", value=min(checks) * per_node, unit="µs", goal=None, better="lower"),
    ]


def _start(run: NodeRun | None, *, value: int) -> tuple[int]:
    return (value,)


def _add(run: NodeRun | None, *, a: int, b: int) -> tuple[int]:
    return (a + b,)


def _show(run: NodeRun | None, *, a: int) -> Shown:
    return Shown(ui={"text": [str(a)]})


def _encoders(folder: Path) -> list[Figure]:
    random = torch.Generator().manual_seed(1)
    time = torch.arange(SONG_S * RATE_HZ) / RATE_HZ
    tones = sum(torch.sin(2 * torch.pi * 110 * 2**octave * time) for octave in range(6)) / 12
    song = torch.stack([tones, tones.flip(0)]) + 0.05 * torch.randn(2, len(time), generator=random)
    mp3 = _seconds(
        lambda: save_sound(str(folder / "x.mp3"), song, RATE_HZ, form="mp3", quality="V0", texts={"prompt": "{}"})
    )
    shade = torch.linspace(0, 1, FILM_SIDE).expand(FILM_SIDE, FILM_SIDE)
    frames = torch.stack(
        [torch.stack([shade.roll(8 * n, 1), shade.t().roll(5 * n, 0), shade * 0.5], dim=-1) for n in range(FILM_FRAMES)]
    )
    mp4 = _seconds(lambda: save_mp4(str(folder / "x.mp4"), Video(frames=frames, fps=FILM_FPS), {"prompt": "{}"}))
    return [
        Figure(name="MP3 V0 of 180 s", value=mp3, unit="s", goal=None, better="lower", baseline=float(SONG_S)),
        Figure(
            name="H.264 of 81 frames 640x640",
            value=mp4,
            unit="s",
            goal=None,
            better="lower",
            baseline=FILM_FRAMES / FILM_FPS,
        ),
    ]


def _seeds(settings: RenderSettings) -> list[Figure]:
    executor = make_executor(settings, settings.folders(clock, SystemIds()), clock)
    found = []
    for name, goal in SEEDS.items():
        text = (REQUESTS / f"{name}.json").read_text().replace('"__RANDOM_INT__"', "7")
        graph = json.loads(text)
        checked = check_prompt(graph, executor.registry.declarations(), executor.folders)
        job = Job(prompt_id=name, graph=graph, outputs=checked.outputs, extra_pnginfo={})
        for what, limit in (("cold", goal), ("from the cache", 1.0)):
            told: list[Event] = []
            spent = _seconds(lambda: executor.run(job, told.append, lambda: False))  # noqa: B023
            found.append(Figure(name=f"{name} miniature, {what}", value=spent, unit="s", goal=limit, better="lower"))
    return found
