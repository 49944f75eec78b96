"""The UMT5 text encoder and its tokenizer, as Wan and ACE-Step use it.

A T5 encoder (relative position biases in every layer, gated GELU, no biases); the sentencepiece model lies in the same
file as the uint8 tensor `spiece_model`. All sizes come from shapes.
Source: Raffel et al. 2020 (T5); Chung et al. 2023 (UMT5: a bias table per layer). Not here: the decoder.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comfyfleet.engine.models.checkpoint import Checkpoint
from comfyfleet.engine.models.layers import Embedding, Linear, RMSNorm, attention
from comfyfleet.engine.models.prompt_weights import Token, has_weights, parse, weigh, words_naming_files
from comfyfleet.engine.models.residency import FP8, Precision, Resident, Source
from comfyfleet.engine.values import ConditioningEntry
from comfyfleet.wire.errors import ModelFileUnusable

EPS = 1e-6
END, PADDING = 1, 0
BUCKETS, FARTHEST = 32, 128
WAN_LENGTH = 512


class Umt5Attention(nn.Module):
    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (Linear(width, inner, bias=False) for _ in range(3))
        self.o = Linear(inner, width, bias=False)
        self.relative_attention_bias = Embedding(BUCKETS, heads)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor | None) -> Tensor:
        """buckets: (n, n) ids of relative positions. mask: (B, 1, 1, n), 0 or very negative."""
        bias = self.relative_attention_bias(buckets).to(x.dtype).permute(2, 0, 1)[None]  # (1, heads, n, n)
        bias = bias if mask is None else bias + mask
        keys = self.k(x) * math.sqrt(self.k.weight.shape[0] // self.heads)  # T5 does not divide by sqrt(d)
        return self.o(attention(self.q(x), keys, self.v(x), self.heads, bias))


class Umt5FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = Linear(width, hidden, bias=False), Linear(width, hidden, bias=False)
        self.wo = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class Umt5AttentionLayer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.SelfAttention = Umt5Attention(width, inner, heads)
        self.layer_norm = RMSNorm(width, EPS)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor | None) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), buckets, mask)


class Umt5FeedForwardLayer(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.DenseReluDense = Umt5FeedForward(width, hidden)
        self.layer_norm = RMSNorm(width, EPS)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class Umt5Block(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Umt5AttentionLayer(width, inner, heads), Umt5FeedForwardLayer(width, hidden)])


class Umt5Stack(nn.Module):
    def __init__(self, blocks: int, width: int, inner: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(Umt5Block(width, inner, heads, hidden) for _ in range(blocks))
        self.final_layer_norm = RMSNorm(width, EPS)


class Umt5(nn.Module):
    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        first = "encoder.block.0.layer."
        rows, width = section.shape("shared.weight")
        heads = section.shape(f"{first}0.SelfAttention.relative_attention_bias.weight")[1]
        inner = section.shape(f"{first}0.SelfAttention.q.weight")[0]
        hidden = section.shape(f"{first}1.DenseReluDense.wi_0.weight")[0]
        self.shared = Embedding(rows, width)
        self.encoder = Umt5Stack(section.count("encoder.block.{}."), width, inner, heads, hidden)

    def forward(self, ids: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """ids: (B, n) -> (B, n, width). mask: (B, n), true where a token counts, or None."""
        x = self.shared(ids).to(dtype)
        buckets = relative_buckets(ids.shape[1], ids.device)
        shut = None if mask is None else torch.where(mask, 0.0, -torch.finfo(dtype).max).to(dtype)[:, None, None, :]
        for block in self.encoder.block:
            x = block.layer[1](block.layer[0](x, buckets, shut))
        return self.encoder.final_layer_norm(x)


def relative_buckets(length: int, device: torch.device) -> Tensor:
    """(n, n) bucket of key position minus query position: half for each sign, near ones exact, far ones logarithmic."""
    position = torch.arange(length, device=device)
    distance = position[None, :] - position[:, None]
    half = BUCKETS // 2
    exact = half // 2
    far = exact + (torch.log(distance.abs().float() / exact) / math.log(FARTHEST / exact) * (half - exact)).long()
    near_or_far = torch.where(distance.abs() < exact, distance.abs(), far.clamp(max=half - 1))
    return near_or_far + (distance > 0).long() * half


@dataclass(frozen=True, kw_only=True)
class Umt5Use:
    """How a family uses the encoder.

    pad_to: shortest token row. clears: padding is not left in the result (zeros instead). Nobody sees padding.
    """

    pad_to: int
    clears: bool


WAN_USE = Umt5Use(pad_to=WAN_LENGTH, clears=True)
ACE_USE = Umt5Use(pad_to=0, clears=False)


class Umt5Encoder(Resident[Umt5]):
    """A UMT5 file as a TextEncoder."""

    def __init__(self, source: Source[Umt5], tokenizer: Umt5Tokenizer, use: Umt5Use, device: str = "cpu") -> None:
        super().__init__(source, device)
        self.tokenizer, self.use = tokenizer, use

    def encode(self, text: str) -> ConditioningEntry:
        return ConditioningEntry(embedding=self.encode_tokens(self.tokenizer.tokens(text)))

    @torch.no_grad()
    def encode_tokens(self, tokens: list[Token]) -> Tensor:
        """Tokens with their end mark -> (1, n, width) float32 on the CPU, n at least `pad_to`."""
        length = max(len(tokens), self.use.pad_to)
        tokens = tokens + [Token(PADDING)] * (length - len(tokens))
        rows = [[token.id for token in tokens]]
        if has_weights(tokens):
            rows.append([END] + [PADDING] * (length - 1))
        ids = torch.tensor(rows, device=self.device)
        ended = (ids == END).long().cumsum(dim=1)
        mask = (ended == 0) | ((ended == 1) & (ids == END))  # true up to and including the first end mark
        embedding = self.network()(ids, mask, self.dtype).float()
        if self.use.clears:
            embedding = embedding * mask[..., None]
        first = embedding[0]
        if has_weights(tokens):
            first = weigh(first, embedding[1], tokens)
        return first[None].cpu()


class Umt5Tokenizer:
    """Prompt to ids: each weighted piece is tokenized by itself, one end mark closes the row. Nothing is cut off.

    `embedding:name` is text here, as in ComfyUI, but for the space before it.
    """

    def __init__(self, model: bytes) -> None:
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)

    def tokens(self, text: str) -> list[Token]:
        found = [
            Token(id, piece.weight)
            for piece in parse(text)
            for part in words_naming_files(piece.text)
            for id in self._pieces.encode(part)
        ]
        return [*found, Token(END)]


@functools.lru_cache(maxsize=4)
def _tokenizer(model: bytes) -> Umt5Tokenizer:
    return Umt5Tokenizer(model)


def open_umt5(
    section: Checkpoint, spiece_model: Tensor, use: Umt5Use, *, round_to: torch.dtype | None = None, device: str = "cpu"
) -> Umt5Encoder:
    """A text encoder from its section of a file.

    round_to: the dtype that ComfyUI holds its weights in; None is the dtype of the file's last norm, as for Wan
    (an all-in-one ACE-Step checkpoint's encoder is held in float16).
    """
    marker = "scaled_fp8"
    if marker in section and section.shape(marker) != (0,):
        raise ModelFileUnusable("a text encoder's scaled_fp8 marker must be empty", tensor=marker)
    kept = round_to or section.dtype("encoder.final_layer_norm.weight")
    precision = Precision(on_cuda=torch.float32, round_to=None if kept in FP8 else kept)
    source = Source(checkpoint=section, build=Umt5, precision=precision)
    return Umt5Encoder(source, _tokenizer(bytes(spiece_model.numpy())), use, device)
