"""The node that belongs to ACE-Step v1 alone: tags and lyrics to a conditioning.

Loading, latents, sampling and decoding are the general nodes; the mathematics is in `engine/models/ace*.py`.
"""

from __future__ import annotations

from pathlib import Path

from comfyfleet.engine.models.ace import AceTextEncoder
from comfyfleet.engine.models.ace_lyrics.tokenizer import VOCABULARY_FILE, LyricTokenizer, LyricVocabularyMissing
from comfyfleet.engine.registry import Input, NodeRegistry, NodeRun, link, real
from comfyfleet.engine.values import Conditioning, TextEncoder
from comfyfleet.wire.errors import ModelFileUnusable

NODES = NodeRegistry()

PROMPT = Input(kind="STRING", details={"multiline": True, "dynamicPrompts": True})


@NODES.node(
    "TextEncodeAceStepAudio",
    inputs={
        "clip": link("CLIP"),
        "tags": PROMPT,
        "lyrics": PROMPT,
        "lyrics_strength": real(1.0, 0.0, 10.0, step=0.01),
    },
    outputs=["CONDITIONING"],
    category="conditioning",
)
def text_encode_ace_step_audio(
    run: NodeRun, *, clip: TextEncoder, tags: str, lyrics: str, lyrics_strength: float
) -> tuple[Conditioning]:
    """Describe a song: its style in tags, its words in lyrics, and how strongly the words count."""
    if not isinstance(clip, AceTextEncoder):
        raise ModelFileUnusable("the connected CLIP is no ACE-Step text encoder", node_input="clip")
    vocabulary = None if clip.own_vocabulary else _provisioned_vocabulary(run)
    return ((clip.encode_song(tags, lyrics, lyrics_strength, vocabulary=vocabulary),),)


def _provisioned_vocabulary(run: NodeRun) -> LyricTokenizer:
    """The authors' vocabulary from the models folder. Raises LyricVocabularyMissing, saying what to fetch."""
    folder, name = VOCABULARY_FILE.split("/")
    try:
        path = run.folders.model_path(folder, name)
    except FileNotFoundError:
        raise LyricVocabularyMissing.here() from None
    return LyricTokenizer.from_file(Path(path))
