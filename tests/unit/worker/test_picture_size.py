"""A small PNG's size is read from its head; what it says must be what opening it says."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from comfyfleet.worker.stages.media import media_facts


def encoded(frames=1, mode="RGB", size=(7, 5)):
    out = io.BytesIO()
    pictures = [Image.new(mode, size, color) for color in range(frames)]
    pictures[0].save(out, "PNG", save_all=frames > 1, append_images=pictures[1:], duration=40)
    return out.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "P", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (300, 2)])
def test_read_and_opened_agree(tmp_path, mode, size):
    data = encoded(mode=mode, size=size)
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    assert media_facts(path, data) == media_facts(path)
    assert (media_facts(path, data).width, media_facts(path, data).height) == size


def test_an_animation_keeps_its_frames(tmp_path):
    data = encoded(frames=3)
    assert media_facts(tmp_path / "film.png", data).frames == 3


@pytest.mark.parametrize("cut", [8, 16, 24, 33])
def test_a_broken_one_has_fewer_facts_and_is_no_error(tmp_path, cut):
    facts = media_facts(tmp_path / "half.png", encoded()[:cut])
    assert facts.kind == "image"
    assert facts.frames is None
