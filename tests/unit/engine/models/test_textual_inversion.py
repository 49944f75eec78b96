"""`embedding:name` in a prompt: rows from a file in the place of tokens, whatever is written around the name."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from comfyfleet.engine.models.checkpoint import open_checkpoint
from comfyfleet.engine.models.clip_text import open_clip, token_rows
from comfyfleet.engine.models.prompt_weights import words_and_rows, words_naming_files
from comfyfleet.engine.models.textual_inversion import TextualInversions
from comfyfleet.engine.models.umt5 import WAN_USE, open_umt5
from comfyfleet.wire.errors import ModelFileUnusable
from engine_goldens import MODELS
from support.engine_world import EngineWorld, folders_below, node

SECTION = open_checkpoint(MODELS / "checkpoints" / "golden_sd15.safetensors").section(
    "cond_stage_model.transformer.text_model."
)
TABLE = SECTION.tensor("embeddings.token_embedding.weight")


def rows_of(words):
    """The table's own rows of some words: a file that holds them must act as the words themselves."""
    ids = [token.id for token in token_rows(words)[0] if token.id < 49406]
    return TABLE[ids].float().clone()


@pytest.fixture
def inversions(tmp_path):
    embeddings = tmp_path / "models" / "embeddings"
    (embeddings / "styles").mkdir(parents=True)
    save_file({"clip_l": rows_of("red apple"), "clip_g": torch.ones(2, 40)}, embeddings / "apple.safetensors")
    save_file({"emb_params": rows_of("old oak tree")}, embeddings / "styles" / "oak.safetensors")
    save_file({"bundle_emb.x.string_to_param.*": rows_of("sea")}, embeddings / "sea.safetensors")
    save_file({"emb_params": torch.ones(3, 1024)}, embeddings / "wide.safetensors")
    (embeddings / "old.pt").write_bytes(b"PK\x03\x04" + b"\0" * 64)
    return TextualInversions(folders_below(tmp_path))


@pytest.mark.parametrize(
    ("prompt", "the_same"),
    [
        ("a embedding:apple on it", "a red apple on it"),
        ("embedding:apple, shiny", "red apple , shiny"),
        ("embedding:styles/oak in spring", "old oak tree in spring"),
        ("embedding:oak.safetensors", "old oak tree"),
        ("a\nembedding:sea", "a sea"),
        ("x (embedding:apple:1.3) y", "x (red apple:1.3) y"),
        ("embedding:apple, embedding:oak", "red apple , old oak tree"),
        ("embedding:none of it", "of it"),
        ("embedding:none, of it", ", of it"),
        ("embedding:../../secret x", "x"),
        ("embedding: embedding:apple", "red apple"),
    ],
)
def test_a_file_of_a_words_rows_is_that_word(inversions, prompt, the_same):
    clip = open_clip(SECTION)

    named, spoken = clip.encode(prompt, inversions.find), clip.encode(the_same)

    assert torch.allclose(named.embedding, spoken.embedding, atol=1e-6)
    assert torch.allclose(named.pooled, spoken.pooled, atol=1e-6)


def test_rows_of_another_width_leave_no_trace_but_their_room(inversions):
    clip = open_clip(SECTION)

    assert torch.equal(clip.encode("a embedding:wide cat", inversions.find).embedding, clip.encode("a cat").embedding)


def test_a_pickle_is_refused_by_name(inversions):
    with pytest.raises(ModelFileUnusable, match=r"old\.pt is a pickle"):
        open_clip(SECTION).encode("embedding:old", inversions.find)


def test_a_word_inside_a_word_names_nothing():
    assert list(words_and_rows("my_embedding:apple")) == ["my_embedding:apple"]
    assert words_naming_files("a embedding:b") == ["a", "embedding:b"]


def test_a_t5_has_no_such_files_and_reads_the_word_as_text():
    checkpoint = open_checkpoint(MODELS / "text_encoders" / "golden_umt5.safetensors")
    tokenizer = open_umt5(checkpoint, checkpoint.tensor("spiece_model"), WAN_USE).tokenizer

    named, pieces = (
        tokenizer.tokens("sea embedding:x, y"),
        (tokenizer.tokens(part) for part in ("sea", "embedding:x, y")),
    )

    assert named[:-1] == [token for piece in pieces for token in piece[:-1]]


def test_a_changed_file_is_read_again_and_not_answered_from_the_cache(tmp_path):
    embeddings = tmp_path / "models" / "embeddings"
    embeddings.mkdir(parents=True)
    save_file({"clip_l": rows_of("red apple")}, embeddings / "thing.safetensors")
    (tmp_path / "models" / "checkpoints").mkdir()
    (tmp_path / "models" / "checkpoints" / "sd.safetensors").symlink_to(
        MODELS / "checkpoints" / "golden_sd15.safetensors"
    )
    world = EngineWorld(tmp_path)
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="sd.safetensors"),
        "2": node("CLIPTextEncode", clip=["1", 1], text="a (embedding:thing:1.1), of old"),
        "3": node("PreviewAny", source=["2", 0]),
    }
    world.run(graph)
    world.run(graph)
    assert "2" not in world.ran()

    save_file({"clip_l": rows_of("sea").repeat(3, 1)}, embeddings / "thing.safetensors")
    world.run(graph)

    assert "2" in world.ran()
