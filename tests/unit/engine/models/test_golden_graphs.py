"""Whole graphs, from prompt to pixels, against what the real ComfyUI 0.3.64 computed at every station."""

from __future__ import annotations

import os

import pytest
import torch

from engine_goldens import MODELS, facts, relative_error, tensors
from engine_graphs import folders_of, values_of


@pytest.mark.parametrize("case", ["t2v_16bit", "t2v_fp8_scaled", "t2v_lora"])
def test_a_film_is_the_references_at_every_station(case, tmp_path):
    graph, known = facts(f"wan/{case}/graph"), tensors(f"wan/{case}/record")

    found = values_of(graph, folders_of(tmp_path, MODELS), only=["VAEDecode"])

    for side, node in (("positive", "99"), ("negative", "91")):
        embedding = found[node][0][0].embedding
        rows = known[f"text.{side}"]
        rows = rows.view(1, -1, rows.shape[-1])
        assert relative_error(embedding[:, : rows.shape[1]], rows) <= 1e-5
        assert not embedding[:, rows.shape[1] :].any()
    assert relative_error(found["96"][0].samples, known["latent.stage1"]) <= 1e-5
    assert relative_error(found["95"][0].samples, known["latent.stage2"]) <= 1e-5
    frames = (found["97"][0] * 255).to(torch.uint8)
    assert frames.shape == known["frames.uint8"].shape
    assert (frames.int() - known["frames.uint8"].int()).abs().max() <= 1


def test_a_lora_on_fp8_weights_is_near_the_reference_which_quantises_again(tmp_path):
    graph, known = facts("wan/t2v_lora_fp8/graph"), tensors("wan/t2v_lora_fp8/record")

    found = values_of(graph, folders_of(tmp_path, MODELS), only=["VAEDecode"])

    assert relative_error(found["95"][0].samples, known["latent.stage2"]) <= 0.05


@pytest.mark.parametrize("case", ["benchmark", "long_prompt_batch"])
def test_a_picture_is_the_references_at_every_station(case, tmp_path):
    graph, known = facts(f"sd15/{case}/graph"), tensors(f"sd15/{case}/record")

    found = values_of(graph, folders_of(tmp_path, MODELS), only=["VAEDecode"])

    for side, node in (("positive", "6"), ("negative", "7")):
        assert relative_error(found[node][0][0].embedding, known[f"text.{side}"]) <= 1e-5
        assert relative_error(found[node][0][0].pooled, known[f"pooled.{side}"]) <= 1e-5
    assert relative_error(found["3"][0].samples, known["latent"]) <= 1e-5
    image = found["8"][0]
    assert relative_error(image[:1, :16], known["image.float_rows"]) <= 1e-5
    assert ((image * 255).to(torch.uint8).int() - known["image.uint8"].int()).abs().max() <= 1


def test_a_song_is_the_references_at_every_station(tmp_path):
    vocabulary = os.environ.get("COMFYFLEET_ACE_VOCAB")
    if not vocabulary:
        pytest.skip("the authors' lyric vocabulary is not here (COMFYFLEET_ACE_VOCAB)")
    graph, known = facts("ace/t2m/graph"), tensors("ace/t2m/record")
    models = tmp_path / "models"
    (models / "tokenizers").mkdir(parents=True)
    (models / "tokenizers" / "ace_step_lyrics_vocab.json").symlink_to(vocabulary)
    (models / "checkpoints").symlink_to(MODELS / "checkpoints")

    found = values_of(graph, folders_of(tmp_path, models), only=["VAEDecodeAudio"])

    for side, node in (("positive", "14"), ("negative", "44")):
        prompt = found[node][0][0]
        assert prompt.lyric_ids.tolist() == known[f"lyric_ids.{side}"].tolist()
        assert (prompt.embedding - known[f"text.{side}"]).norm() <= 1e-5 * known["text.positive"].norm()
    assert relative_error(found["52"][0].samples, known["latent"]) <= 1e-5
    assert relative_error(found["18"][0].waveform, known["waveform"]) <= 1e-5
