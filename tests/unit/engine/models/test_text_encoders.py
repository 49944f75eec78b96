"""Prompts to ids, weights and embeddings, against ComfyUI's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from comfyfleet.engine.models.checkpoint import open_checkpoint
from comfyfleet.engine.models.clip_text import END, ROW_LENGTH, START, open_clip, token_rows
from comfyfleet.engine.models.prompt_weights import Piece, parse
from comfyfleet.engine.models.umt5 import ACE_USE, WAN_USE, open_umt5
from comfyfleet.wire.errors import ModelFileUnusable
from engine_goldens import MODELS, facts, relative_error, tensors

CLIP_PROMPTS = facts("sd15/prompts")["texts"]
UMT5_PROMPTS = facts("wan/units")["prompts"]
UMT5_CASES = [(file, prompt) for file, prompts in UMT5_PROMPTS.items() for prompt in prompts]


def a_umt5(name, use=WAN_USE):
    checkpoint = open_checkpoint(MODELS / "text_encoders" / f"{name}.safetensors")
    return open_umt5(checkpoint, checkpoint.tensor("spiece_model"), use)


def a_clip():
    checkpoint = open_checkpoint(MODELS / "checkpoints" / "golden_sd15.safetensors")
    return open_clip(checkpoint.section("cond_stage_model.transformer.text_model."))


@pytest.mark.parametrize(("file", "prompt"), UMT5_CASES)
def test_umt5_ids_are_exact_and_embeddings_equal(file, prompt):
    known, encoder = UMT5_PROMPTS[file][prompt], a_umt5(file)

    tokens = encoder.tokenizer.tokens(known["text"])
    embedding = encoder.encode(known["text"]).embedding

    assert [token.id for token in tokens] == known["ids"]
    assert [token.weight for token in tokens] == known.get("weights", [1.0] * len(tokens))
    assert embedding.shape == (1, known["padded_length"], 32)
    rows = known["rows_stored"]
    assert relative_error(embedding[:, :rows], tensors("wan/units")[f"text.{file}.{prompt}"].view(1, rows, -1)) <= 1e-5
    assert not embedding[:, len(tokens) :].any()


def test_a_prompt_longer_than_512_tokens_is_kept_whole():
    encoder = a_umt5("golden_umt5")

    assert encoder.encode("many words " * 400).embedding.shape[1] > 512


def test_without_padding_the_embedding_has_as_many_rows_as_tokens():
    encoder = a_umt5("golden_umt5", ACE_USE)
    tokens = encoder.tokenizer.tokens("a song about the sea")

    assert encoder.encode("a song about the sea").embedding.shape[1] == len(tokens)


def test_a_text_encoders_scaled_fp8_marker_must_be_empty(tmp_path):
    given = open_checkpoint(MODELS / "text_encoders" / "golden_umt5_fp8_scaled.safetensors")
    made = {name: given.tensor(name).clone() for name in given}
    made["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(made, tmp_path / "odd.safetensors")
    checkpoint = open_checkpoint(tmp_path / "odd.safetensors")

    with pytest.raises(ModelFileUnusable, match="marker must be empty"):
        open_umt5(checkpoint, checkpoint.tensor("spiece_model"), WAN_USE)


def test_weights_are_rounded_to_fp16_where_comfyui_holds_them_so(tmp_path):
    given = open_checkpoint(MODELS / "text_encoders" / "golden_umt5.safetensors")
    wide = {name: given.tensor(name).clone() for name in given}
    for name, tensor in wide.items():
        if tensor.is_floating_point():
            wide[name] = tensor.float() * (1 + 1e-4)
    save_file(wide, tmp_path / "wide.safetensors")
    checkpoint = open_checkpoint(tmp_path / "wide.safetensors")
    spiece = checkpoint.tensor("spiece_model")

    rounded = open_umt5(checkpoint, spiece, ACE_USE, round_to=torch.float16).encode("sea").embedding
    unrounded = open_umt5(checkpoint, spiece, ACE_USE).encode("sea").embedding

    assert 1e-5 < relative_error(rounded, unrounded) < 1e-2


@pytest.mark.parametrize("prompt", CLIP_PROMPTS)
def test_clip_rows_are_exact(prompt):
    known = CLIP_PROMPTS[prompt]

    rows = token_rows(known["text"])

    assert [[token.id for token in row] for row in rows] == [chunk["ids"] for chunk in known["chunks"]]
    assert [[token.weight for token in row] for row in rows] == [
        chunk.get("weights", [1.0] * ROW_LENGTH) for chunk in known["chunks"]
    ]


@pytest.mark.parametrize(
    "prompt", [name.removeprefix("pooled.") for name in tensors("sd15/prompts") if "pooled" in name]
)
def test_clip_embeddings_and_pooled_rows_equal(prompt):
    entry = a_clip().encode(CLIP_PROMPTS[prompt]["text"])

    assert relative_error(entry.embedding, tensors("sd15/prompts")[f"embedding.{prompt}"]) <= 1e-5
    assert relative_error(entry.pooled, tensors("sd15/prompts")[f"pooled.{prompt}"]) <= 1e-5


def test_stopping_a_layer_earlier_changes_the_embedding_and_not_the_pooled_row():
    clip = a_clip()
    last, earlier, too_deep = (clip.stopping_at(layer).encode("a red apple") for layer in (-1, -2, -9))

    assert not torch.allclose(last.embedding, earlier.embedding)
    assert torch.equal(last.pooled, earlier.pooled)
    assert torch.equal(last.embedding, too_deep.embedding)
    assert clip.stopping_at(-2).key != clip.key


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("cat e\u0301 dog", [2368, 4166, 1929]),
        ("\u212b A\u030a", [127, 354, 127, 354]),
        ("a<|endoftext|>b", [320, END, 321]),
        ("<|endoftext|><|endoftext|>,", [END, END, 267]),
        ("a <|STARTOFTEXT|> b", [320, START, 321]),
        ("a <|endoftext|", [320, 27, 347, 40786, 4160, 347]),
        ("A<|EndOfText|>b", [320, 27, 347, 40786, 4160, 91, 285, 321]),
    ],
)
def test_letters_are_composed_and_a_mark_in_the_text_is_one_token(prompt, ids):
    (row,) = token_rows(prompt)

    assert [token.id for token in row] == [START, *ids] + [END] * (ROW_LENGTH - 1 - len(ids))


@settings(deadline=None)  # the first call reads the vocabulary
@given(st.text(alphabet="ab ():.0123456789\\", max_size=40))
def test_any_prompt_becomes_full_rows(prompt):
    rows = token_rows(prompt)

    assert all(len(row) == ROW_LENGTH for row in rows)
    assert all(row[0].id == 49406 and row[-1].id == 49407 for row in rows)


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("plain", [Piece("plain", 1.0)]),
        ("(a)", [Piece("a", 1.1)]),
        ("((a))", [Piece("a", 1.1 * 1.1)]),
        ("x (a:1.5) y", [Piece("x ", 1.0), Piece("a", 1.5), Piece(" y", 1.0)]),
        ("(a:b)", [Piece("a:b", 1.1)]),
        ("(a (b:2) c)", [Piece("a ", 1.1), Piece("b", 2.0), Piece(" c", 1.1)]),
        (r"a \(b\)", [Piece("a (b)", 1.0)]),
        ("(:2)", [Piece(":2", 1.1)]),
        ("(open", [Piece("(open", 1.0)]),
    ],
)
def test_brackets_are_weights(prompt, pieces):
    assert [(piece.text, pytest.approx(piece.weight)) for piece in pieces] == [
        (piece.text, piece.weight) for piece in parse(prompt)
    ]
