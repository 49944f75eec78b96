"""The LightX2V example renders on miniatures: a LoRA on each expert, no guidance, two and two steps."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pytest

from comfyfleet.engine.miniatures import ensure
from comfyfleet.engine.render.setup import RenderSettings
from comfyfleet.engine.run import run_graph

EXAMPLE = Path(__file__).parents[2] / "examples" / "wan22_t2v_lightx2v_4steps.json"


@pytest.mark.slow
def test_the_four_step_example_renders_a_film_on_miniatures(tmp_path):
    graph = json.loads(EXAMPLE.read_text())
    graph["104"]["inputs"].update(width=64, height=48, length=9)
    ensure(tmp_path / "miniatures")
    steps = []

    outcome = run_graph(
        graph,
        RenderSettings(
            models_dir=str(tmp_path / "models"),
            miniatures_dir=str(tmp_path / "miniatures"),
            input_dir=str(tmp_path / "input"),
            output_dir=str(tmp_path / "output"),
            temp_dir=str(tmp_path / "temp"),
        ),
        steps.append,
    )

    assert (outcome.status, outcome.failure) == ("success", None)
    assert outcome.miniature
    (film,) = (tmp_path / "output").rglob("*.mp4")
    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (64, 48, 16)
        assert sum(1 for _ in container.decode(stream)) == 9
    assert [node["inputs"]["steps"] for node in graph.values() if node["class_type"] == "KSamplerAdvanced"] == [4, 4]
