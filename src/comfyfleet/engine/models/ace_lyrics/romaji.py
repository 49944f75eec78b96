"""Kana to Latin letters, Hepburn spelling, as the model's reference does it; kanji and everything else stays.

The table is made from the Unicode names of the letters ("KATAKANA LETTER SI" is shi). Kept oddities: the long vowel
mark and small vowels stay as they are, a small tsu doubles the next consonant (never an n) and is dropped otherwise.
"""

from __future__ import annotations

import unicodedata

CONSONANTS = ("", "K", "S", "T", "N", "H", "M", "R", "G", "Z", "D", "B", "P")
SYLLABLES = (*(c + v for c in CONSONANTS for v in "AIUEO"), "YA", "YU", "YO", "WA", "WO", "N")
HEPBURN = {"SI": "shi", "TI": "chi", "TU": "tsu", "HU": "fu", "ZI": "ji", "DI": "ji", "DU": "zu"}
GLIDED = ("KI", "SI", "TI", "NI", "HI", "MI", "RI", "GI", "ZI", "BI", "PI")  # join a small ya, yu, yo
PUNCTUATION = {"\u3000": " ", "、": ", ", "。": ". "}
SMALL_TSU = {"っ", "ッ"}
SMALL_GLIDES = set("ゃゅょャュョ")


def _spelled(syllable: str) -> str:
    return HEPBURN.get(syllable, syllable.lower())


def _table() -> dict[str, str]:
    table = dict(PUNCTUATION)
    for script in ("HIRAGANA", "KATAKANA"):

        def letter(name: str, script: str = script) -> str:
            return unicodedata.lookup(f"{script} LETTER {name}")

        table |= {letter(syllable): _spelled(syllable) for syllable in SYLLABLES}
        table |= {letter(f"SMALL Y{vowel}"): f"y{vowel.lower()}" for vowel in "AUO"}
        table[letter("SMALL TU")] = ""
        for syllable in GLIDED:
            stem = _spelled(syllable)[:-1]  # k, sh, ch, j, …
            glide = stem if stem in ("sh", "ch", "j") else stem + "y"
            table |= {letter(syllable) + letter(f"SMALL Y{vowel}"): glide + vowel.lower() for vowel in "AUO"}
    table[unicodedata.lookup("KATAKANA LETTER VU")] = "vu"
    return table


TABLE = _table()


def romanise(text: str) -> str:
    """こんにちは -> konnichiha. Text without kana, Japanese commas, full stops or wide spaces comes back unchanged."""
    written: list[str] = []
    at = 0
    while at < len(text):
        letter, pair = text[at], text[at : at + 2]
        if letter in SMALL_TSU and len(pair) == 2:
            following = TABLE.get(pair[1], "")
            if following and following[0] not in "aiueon":
                written.append(following[0])
            at += 1
        elif pair[1:] in SMALL_GLIDES and pair in TABLE:
            written.append(TABLE[pair])
            at += 2
        else:
            written.append(TABLE.get(letter, letter))
            at += 1
    return "".join(written)
