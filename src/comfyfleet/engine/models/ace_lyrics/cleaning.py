"""A line of lyrics made plain: quotes dropped, lower case, and in English numbers, abbreviations and symbols in words.

Only English has words for these; other languages keep digits and signs, as in the reference. Pure functions of text.
"""

from __future__ import annotations

import re

from comfyfleet.engine.models.ace_lyrics.numbers import spell_numbers

# Spoken before a full stop, as whole beginnings of words ("St." but not "best."). Applied in this order.
ABBREVIATIONS = {
    "mrs": "misess",  # spelled so in the model's training text
    "mr": "mister",
    "dr": "doctor",
    "st": "saint",
    "co": "company",
    "jr": "junior",
    "maj": "major",
    "gen": "general",
    "drs": "doctors",
    "rev": "reverend",
    "lt": "lieutenant",
    "hon": "honorable",
    "sgt": "sergeant",
    "capt": "captain",
    "esq": "esquire",
    "ltd": "limited",
    "col": "colonel",
    "ft": "fort",
}
SYMBOLS = str.maketrans(
    {
        sign: f" {word} "
        for sign, word in zip("&@%#$£°", ("and", "at", "percent", "hash", "dollar", "pound", "degree"), strict=True)
    }
)
TURKISH_CAPITALS = str.maketrans("İÖÜ", "iöü")


def clean(line: str, language: str) -> str:
    """A line as it is tokenized, before its language tag."""
    line = line.replace('"', "")
    if language == "tr":
        line = line.translate(TURKISH_CAPITALS)  # lower() would leave a dot of its own behind the i
    line = line.lower()
    if language == "en":
        line = spell_numbers(line)
        for short, spoken in ABBREVIATIONS.items():
            line = re.sub(rf"\b{short}\.", spoken, line, flags=re.IGNORECASE)
        line = line.translate(SYMBOLS).strip()
    return re.sub(r"\s+", " ", line)
