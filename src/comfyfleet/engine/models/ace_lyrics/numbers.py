"""Numbers in lyrics, spelled out in English words as the model's reference cleaner does.

"21" is "twenty one" (no hyphen, no "and"), 0.5 is "point five", ordinals are spoken like plain numbers ("21st" is
"twenty one"), amounts of money keep no unit ("$5" is "five point zero"). Known oddities of the reference that change
ids are kept on purpose; `spell_numbers` says where. Pure functions of text.
"""

from __future__ import annotations

import re

SMALL = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SCALES = ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred"))

GROUPED = re.compile(r"\b\d{1,3}(?:,\d{3})*(?:\.\d+)?\b")
DECIMAL = re.compile(r"[0-9]+[.,][0-9]+")
ORDINAL = re.compile(r"([0-9]+)(?:st|nd|rd|th)")
WHOLE = re.compile(r"[0-9]+")
MONEY = tuple(re.compile(rf"{sign}[0-9.,]*[0-9]+|[0-9.,]*[0-9]+{sign}") for sign in ("£", r"\$", "€"))


class Unspeakable(ValueError):
    """A number the reference gives up on: written with an exponent, or no number at all ("1.2.3" as money)."""


def whole_in_words(number: int) -> str:
    """12345 -> "twelve thousand three hundred forty five"; 0 -> "" (a silent part of something bigger)."""
    if number == 0:
        return ""
    if number < 20:
        return SMALL[number]
    if number < 100:
        return f"{TENS[number // 10 - 2]} {whole_in_words(number % 10)}".rstrip()
    size, name = next(scale for scale in SCALES if number >= scale[0])
    return f"{whole_in_words(number // size)} {name} {whole_in_words(number % size)}".rstrip()


def in_words(number: int | float) -> str:
    """A number as it is spoken; the digits after a point one by one."""
    if number == 0:
        return "zero"
    if isinstance(number, int):
        return whole_in_words(number)
    shown = str(number)
    if "e" in shown or "." not in shown:
        raise Unspeakable(shown)
    return f"{whole_in_words(int(number))} point {' '.join(SMALL[int(digit)] for digit in shown.split('.')[1])}"


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise Unspeakable(text) from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # longer than Python converts
        raise Unspeakable(text[:20]) from None


def _amount(match: re.Match[str]) -> str:
    return in_words(_real(re.sub(r"[^\d.]", "", match[0].replace(",", "."))))


def spell_numbers(text: str) -> str:
    """All numbers of a lower-case English text in words; the text unchanged when one of them cannot be spoken.

    In this order: commas inside grouped numbers go; pounds, dollars, euros (the first amount that cannot be read ends
    the money, not the rest); decimals with point or comma; ordinals; what is left.
    """
    original = text
    text = GROUPED.sub(lambda match: match[0].replace(",", ""), text)
    try:
        for money in MONEY:
            text = money.sub(_amount, text)
    except Unspeakable:
        pass
    try:
        text = DECIMAL.sub(lambda match: in_words(_real(match[0].replace(",", "."))), text)
        text = ORDINAL.sub(lambda match: in_words(_whole(match[1])), text)
        return WHOLE.sub(lambda match: in_words(_whole(match[0])), text)
    except Unspeakable:
        return original
