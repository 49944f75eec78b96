"""A tiny sentencepiece model for miniature text encoders: letters and bytes, no words, made in milliseconds."""

from __future__ import annotations

import io

import sentencepiece
import torch
from torch import Tensor

CORPUS = ("the quick brown fox jumps over the lazy dog, 0123456789 times!",) * 20
ROWS = 320  # of the embedding: 256 bytes, control pieces and the corpus's letters, with room to spare


def sentencepiece_model() -> Tensor:
    """The serialised model as published files embed one, uint8. Ids: 0 padding, 1 end; unknown letters become bytes."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        model_type="char",
        vocab_size=ROWS,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8)
