"""Prompt emphasis: "(red:1.3) kite and ((two)) birds" becomes pieces of text with weights.

Brackets multiply by 1.1 per level, "(text:w)" sets w, and a backslash takes a bracket's meaning away. Applying a weight
is the same for every text encoder: an embedding row moves away from the empty prompt's row by the factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

LEVEL_WEIGHT = 1.1
EMBEDDING_WORD = "embedding:"
ESCAPED_OPEN, ESCAPED_CLOSE = "\0\2", "\0\1"  # stand for \( and \) while brackets are parsed


@dataclass(frozen=True)
class Piece:
    text: str
    weight: float


@dataclass(frozen=True)
class Token:
    """`row`: (width,), stands in the place of the id's own row; such a token's id means nothing."""

    id: int
    weight: float = 1.0
    row: Tensor | None = field(default=None, compare=False)


# A textual-inversion file by the name in a prompt: (rows, width), or None when there is none.
FindRows = Callable[[str], Tensor | None]


def no_rows(name: str) -> Tensor | None:
    """There are no such files."""
    return None


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


def words_and_rows(text: str, find: FindRows = no_rows) -> Iterator[str | Tensor]:
    """A piece's texts in order, and between them the rows of the files that `embedding:name` names.

    The word begins a piece or follows a space or a line's end, which goes with it. A name that finds nothing is
    dropped, but for its commas; what follows it up to the next such word has its spaces made single.
    """
    for word in words_naming_files(text):
        if not word.startswith(EMBEDDING_WORD):
            yield word
            continue
        name, *following = word.removeprefix(EMBEDDING_WORD).split() or [""]
        rest, rows = " ".join(following), find(name)
        bare = name.strip(",")
        if rows is None and bare != name:
            rest, rows = f"{name[len(bare) :]} {rest}", find(bare)
        if rows is not None:
            yield rows.reshape(-1, rows.shape[-1])
        if rest:
            yield rest


def words_naming_files(text: str) -> list[str]:
    """Cut before each word that names a file; the space or line's end there goes."""
    first, *others = text.replace(f"\n{EMBEDDING_WORD}", f" {EMBEDDING_WORD}").split(f" {EMBEDDING_WORD}")
    return [word for word in (first, *(EMBEDDING_WORD + other for other in others)) if word]


def ids_and_rows(tokens: list[Token], width: int, padding: int) -> tuple[list[int], list[tuple[int, Tensor]]]:
    """The ids to embed, and (place, row) for what stands in their stead; rows of another width leave no trace.

    Those were made for another model: ComfyUI drops them too, and pads at the end.
    """
    fitting = [token for token in tokens if token.row is None or token.row.shape[-1] == width]
    ids = [token.id for token in fitting]
    rows = [(place, token.row) for place, token in enumerate(fitting) if token.row is not None]
    return ids + [padding] * (len(tokens) - len(fitting)), rows


def weigh(rows: Tensor, empty_rows: Tensor, tokens: list[Token]) -> Tensor:
    """rows, empty_rows: (tokens, width). Row i becomes (row - empty) w + empty; rows of weight 1 stay bit for bit."""
    weights = torch.tensor([token.weight for token in tokens], dtype=rows.dtype, device=rows.device).unsqueeze(1)
    return torch.where(weights == 1.0, rows, (rows - empty_rows) * weights + empty_rows)


def has_weights(tokens: list[Token]) -> bool:
    return any(token.weight != 1.0 for token in tokens)
