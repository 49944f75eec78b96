"""Prompt emphasis: "(red:1.3) kite and ((two)) birds" becomes pieces of text with weights.

Brackets multiply by 1.1 per level, "(text:w)" sets w, and a backslash takes a bracket's meaning away. Applying a weight
is the same for every text encoder: an embedding row moves away from the empty prompt's row by the factor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL_WEIGHT = 1.1
EMBEDDING_WORD = re.compile(r"(?:^|(?<=[ \n]))embedding:[^ ]*")
ESCAPED_OPEN, ESCAPED_CLOSE = "\0\2", "\0\1"  # stand for \( and \) while brackets are parsed


@dataclass(frozen=True)
class Piece:
    text: str
    weight: float


@dataclass(frozen=True)
class Token:
    id: int
    weight: float = 1.0


def parse(prompt: str) -> list[Piece]:
    """Pieces in order; brackets that have no partner are left as they stand."""
    hidden = prompt.replace("\\)", ESCAPED_CLOSE).replace("\\(", ESCAPED_OPEN)
    return [
        Piece(piece.text.replace(ESCAPED_CLOSE, ")").replace(ESCAPED_OPEN, "("), piece.weight)
        for piece in _weighed(hidden, 1.0)
    ]


def _weighed(text: str, weight: float) -> list[Piece]:
    pieces: list[Piece] = []
    for part in _top_level_parts(text):
        if len(part) < 2 or part[0] != "(" or part[-1] != ")":
            pieces.append(Piece(part, weight))
            continue
        inner, inner_weight = part[1:-1], weight * LEVEL_WEIGHT
        before, colon, after = inner.rpartition(":")
        if colon and before and _number(after) is not None:
            inner, inner_weight = before, _number(after) or 0.0
        pieces.extend(_weighed(inner, inner_weight))
    return pieces


def _top_level_parts(text: str) -> list[str]:
    """Split at brackets of the outermost level; a bracketed part keeps its brackets."""
    parts, current, depth = [], "", 0
    for letter in text:
        if letter == "(":
            if depth == 0 and current:
                parts.append(current)
                current = ""
            depth += 1
            current += letter
        elif letter == ")":
            depth -= 1
            current += letter
            if depth == 0:
                parts.append(current)
                current = ""
        else:
            current += letter
    return [*parts, current] if current else parts


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def without_embeddings(text: str) -> list[str]:
    """`embedding:name` names a file of a kind this engine lacks: dropped, as ComfyUI drops a missing one."""
    return [part for part in EMBEDDING_WORD.split(text) if part]


def weigh(rows: Tensor, empty_rows: Tensor, tokens: list[Token]) -> Tensor:
    """rows, empty_rows: (tokens, width). Row i becomes (row - empty) w + empty; rows of weight 1 stay bit for bit."""
    weights = torch.tensor([token.weight for token in tokens], dtype=rows.dtype, device=rows.device).unsqueeze(1)
    return torch.where(weights == 1.0, rows, (rows - empty_rows) * weights + empty_rows)


def has_weights(tokens: list[Token]) -> bool:
    return any(token.weight != 1.0 for token in tokens)
