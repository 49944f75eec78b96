"""TextEncodeAceStepAudio: declared as ComfyUI declares it, and clear about a vocabulary that is not there."""

import os
from types import SimpleNamespace

import pytest

from comfyfleet.engine.models.ace_lyrics.tokenizer import VOCABULARY_FILE, LyricVocabularyMissing
from comfyfleet.engine.models.open_file import open_all_in_one
from comfyfleet.engine.nodes.ace import NODES
from comfyfleet.wire.errors import ModelFileUnusable
from engine_ace import CHECKPOINT, parts
from engine_goldens import facts, tensors


def run_in(models_dir):
    """A node run whose model folders are below `models_dir`."""

    def model_path(folder, name):
        path = models_dir / folder / name
        if not path.is_file():
            raise FileNotFoundError(path)
        return str(path)

    return SimpleNamespace(folders=SimpleNamespace(model_path=model_path), device="cpu")


def test_it_is_declared_as_comfyui_declares_it():
    declared = NODES["TextEncodeAceStepAudio"].declaration

    assert list(declared.inputs) == ["clip", "tags", "lyrics", "lyrics_strength"]
    assert declared.inputs["tags"].details == {"multiline": True, "dynamicPrompts": True}
    strength = declared.inputs["lyrics_strength"]
    assert (strength.default, strength.minimum, strength.maximum, strength.details) == (1.0, 0.0, 10.0, {"step": 0.01})
    assert (declared.outputs, declared.category) == (("CONDITIONING",), "conditioning")


def test_a_published_file_without_its_vocabulary_says_what_to_fetch(tmp_path):
    encode = NODES["TextEncodeAceStepAudio"].function

    with pytest.raises(LyricVocabularyMissing) as refused:
        encode(run_in(tmp_path), clip=parts()[1], tags="funk", lyrics="la", lyrics_strength=1.0)

    assert VOCABULARY_FILE in str(refused.value)
    assert "ace-step/ACE-Step" in str(refused.value)


def test_the_provisioned_vocabulary_is_used(tmp_path):
    given = os.environ.get("COMFYFLEET_ACE_VOCAB")
    if not given:
        pytest.skip("the authors' lyric vocabulary is not here (COMFYFLEET_ACE_VOCAB)")
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / VOCABULARY_FILE).symlink_to(given)
    _, clip, _ = open_all_in_one(str(CHECKPOINT), "cpu")

    inputs = facts("ace/t2m/graph")["14"]["inputs"] | {"clip": clip}
    ((entry,),) = NODES["TextEncodeAceStepAudio"].function(run_in(tmp_path), **inputs)

    assert entry.lyrics_strength == 0.99
    assert entry.lyric_ids.tolist() == tensors("ace/t2m/record")["lyric_ids.positive"].tolist()


def test_another_familys_text_encoder_is_refused(tmp_path):
    wan = object()

    with pytest.raises(ModelFileUnusable, match="no ACE-Step text encoder"):
        NODES["TextEncodeAceStepAudio"].function(
            run_in(tmp_path), clip=wan, tags="funk", lyrics="", lyrics_strength=1.0
        )
