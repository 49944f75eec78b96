"""Lyrics to token ids: a byte-pair vocabulary behind language tags, one line at a time.

The vocabulary is a file of the model's authors that we do not ship (`VOCABULARY_FILE` in the models folder); a
miniature checkpoint brings a small one of its own. Ids 261 and 2 open the lyrics and end a line in either.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from comfyfleet.engine.models.ace_lyrics.cleaning import clean
from comfyfleet.engine.models.ace_lyrics.romaji import romanise
from comfyfleet.wire.errors import ModelFileUnusable

START_ID = 261
LINE_END_ID = 2
VOCABULARY_FILE = "tokenizers/ace_step_lyrics_vocab.json"
VOCABULARY_SHA256 = "c2a66ea48c478c0bb9acb5497144b926acdeaa37128faa799508d40f2b9cc558"
LANGUAGES = frozenset(
    ["en", "de", "fr", "es", "it", "pt", "pl", "tr", "ru", "cs", "nl", "ar", "zh", "ja", "hu", "ko", "hi"]
)
TAGS = {"zh": "zh-cn"}  # the tag of a language where it is not its name
SECTION = re.compile(r"\[.*?\]")


class LyricVocabularyMissing(ModelFileUnusable):
    """A published ACE-Step checkpoint was given lyrics, and its authors' vocabulary file is not there."""

    @staticmethod
    def here() -> LyricVocabularyMissing:
        return LyricVocabularyMissing(
            f"ACE-Step lyrics need the model's vocabulary at <models-dir>/{VOCABULARY_FILE}: it is "
            "acestep/models/lyrics_utils/vocab.json of the repository ace-step/ACE-Step on GitHub (Apache-2.0)",
            file=VOCABULARY_FILE,
            sha256=VOCABULARY_SHA256,
        )


@dataclass(frozen=True, kw_only=True)
class LyricTokenizer:
    """`vocabulary` is a `tokenizers` model with the tags "[en]" … and "[SPACE]" as special tokens."""

    vocabulary: Any

    @staticmethod
    def from_json(text: str) -> LyricTokenizer:
        return LyricTokenizer(vocabulary=Tokenizer.from_str(text))

    @staticmethod
    def from_file(path: Path) -> LyricTokenizer:
        """The authors' file, checked against its SHA-256. Raises ModelFileUnusable for any other."""
        return _provisioned(str(path), path.stat().st_mtime_ns)

    def encode(self, segments: Iterable[str]) -> list[int]:
        """Ids of lyrics cut into segments (a weight in brackets begins a new one); an empty segment has none."""
        ids = [START_ID]
        for segment in segments:
            if segment:
                ids += self.encode_lines(segment)
        return ids

    def encode_lines(self, text: str) -> list[int]:
        ids: list[int] = []
        for line in text.split("\n"):
            ids += self.encode_line(line)
            ids.append(LINE_END_ID)
        return ids

    def encode_line(self, line: str) -> list[int]:
        line = line.strip()
        if not line:
            return []
        return list(self.vocabulary.encode(tagged(line)).ids)


@functools.lru_cache(maxsize=2)
def _provisioned(path: str, changed_ns: int) -> LyricTokenizer:
    content = Path(path).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != VOCABULARY_SHA256:
        raise ModelFileUnusable(
            f"{VOCABULARY_FILE} is not the vocabulary that ACE-Step was trained with",
            file=VOCABULARY_FILE,
            sha256=digest,
            needed=VOCABULARY_SHA256,
        )
    return LyricTokenizer.from_json(content.decode())


def tagged(line: str) -> str:
    """A stripped line as the vocabulary sees it: "[fr]le chat" -> "[fr]le[SPACE]chat"."""
    language, line = split_language(line)
    roman = romanise(line)
    if roman != line:
        language, line = "ja", roman
    if SECTION.match(line):
        language = "en"
    return f"[{TAGS.get(language, language)}]{clean(line, language)}".replace(" ", "[SPACE]")


def split_language(line: str) -> tuple[str, str]:
    """A leading "[xx]" of a known language, in either case, is taken off; else English."""
    if line.startswith("[") and line[3:4] == "]" and line[1:3].lower() in LANGUAGES:
        return line[1:3].lower(), line[4:]
    return "en", line
