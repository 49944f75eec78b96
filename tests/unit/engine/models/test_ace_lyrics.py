"""Lyrics become the ids that ComfyUI 0.3.64 makes of them.

The authors' vocabulary is no part of this tree. Without it the goldens' ids are spelled out with an excerpt of its
pieces (goldens/ace/lyric_pieces.json) and compared with our cleaned text; with it (COMFYFLEET_ACE_VOCAB, or
tokenizers/ace_step_lyrics_vocab.json in the folder COMFYFLEET_MODELS_DIR) the ids themselves are compared.
"""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.engine.miniatures.ace import lyric_ids, lyric_vocabulary
from comfyfleet.engine.models.ace_lyrics.cleaning import clean
from comfyfleet.engine.models.ace_lyrics.numbers import spell_numbers
from comfyfleet.engine.models.ace_lyrics.romaji import romanise
from comfyfleet.engine.models.ace_lyrics.tokenizer import (
    LINE_END_ID,
    START_ID,
    VOCABULARY_FILE,
    LyricTokenizer,
    LyricVocabularyMissing,
    split_language,
    tagged,
)
from comfyfleet.engine.models.prompt_weights import parse
from comfyfleet.wire.errors import ModelFileUnusable
from engine_ace import parts
from engine_goldens import facts

LYRICS = facts("ace/lyric_ids")
PIECES = facts("ace/lyric_pieces")["pieces"]
UNKNOWN = 1


def authors_vocabulary():
    given = os.environ.get("COMFYFLEET_ACE_VOCAB")
    models = os.environ.get("COMFYFLEET_MODELS_DIR")
    for path in (given, models and Path(models) / VOCABULARY_FILE):
        if path and Path(path).is_file():
            return Path(path)
    return None


def spelled(ids):
    """Golden ids as a pattern of the text they stand for; the unknown piece stands for any one letter."""
    return "".join("." if id == UNKNOWN else re.escape(PIECES[str(id)]) for id in ids)


@pytest.mark.parametrize("name", sorted(LYRICS["texts"]))
def test_cleaned_lyrics_read_as_the_reference_ids_do(name):
    case = LYRICS["texts"][name]
    assert case["ids"][0] == START_ID

    lines = [line.strip() for piece in parse(case["text"]) for line in piece.text.split("\n") if piece.text]
    read = "".join((tagged(line).replace(" ", "") if line else "") + "[SPACE]" for line in lines)

    assert re.fullmatch(spelled(case["ids"][1:]), read), read


@pytest.mark.parametrize("name", sorted(LYRICS["texts"]))
def test_ids_equal_the_reference_with_the_authors_vocabulary(name):
    path = authors_vocabulary()
    if path is None:
        pytest.skip("the authors' lyric vocabulary is not here (COMFYFLEET_ACE_VOCAB)")
    case = LYRICS["texts"][name]

    entry = parts()[1].encode_song("", case["text"], 1.0, vocabulary=LyricTokenizer.from_file(path))

    assert entry.lyric_ids.tolist() == [case["ids"]]


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("0 and 10", "zero and ten"),
        ("21 47 90", "twenty one forty seven ninety"),
        ("100 101 999", "one hundred one hundred one nine hundred ninety nine"),
        ("1000 12345", "one thousand twelve thousand three hundred forty five"),
        ("2000000", "two million"),
        ("1,234,567", "one million two hundred thirty four thousand five hundred sixty seven"),
        ("3000000001", "three billion one"),
        ("12.5", "twelve point five"),
        ("0.05", " point zero five"),
        ("7,5", "seven point five"),
        ("the 3rd and 22nd", "the three and twenty two"),
        ("$5", "five point zero"),
        ("£2.50 or 3€", "two point five or three point zero"),
        ("at 10:30", "at ten:thirty"),
        ("99999999999999999999.5", "99999999999999999999.5"),
    ],
)
def test_numbers_are_spoken(written, spoken):
    assert spell_numbers(written) == spoken


@pytest.mark.parametrize(
    ("line", "language", "cleaned"),
    [
        ('He said "GO"', "en", "he said go"),
        ("Dr. No & Mrs. X", "en", "doctor no and misess x"),
        ("the best. St. Ives", "en", "the best. saint ives"),
        ("100% @ 20°", "en", "one hundred percent at twenty degree"),
        ("50% & 3", "de", "50% & 3"),
        ("İÖÜ", "tr", "iöü"),
        ("a \t  b", "fr", "a b"),
    ],
)
def test_a_line_is_made_plain(line, language, cleaned):
    assert clean(line, language) == cleaned


@pytest.mark.parametrize(
    ("kana", "roman"),
    [
        ("こんにちは", "konnichiha"),
        ("きって", "kitte"),
        ("まっちゃ", "maccha"),
        ("シャツ", "shatsu"),
        ("ジュース", "juーsu"),
        ("ヂャ", "jiya"),
        ("あっ", "a"),
        ("あっん", "an"),
        ("ファ", "fuァ"),
        ("ゔヴ", "ゔvu"),
        ("歌、夢。", "歌, 夢. "),
        ("plain words", "plain words"),
    ],
)
def test_kana_are_romanised(kana, roman):
    assert romanise(kana) == roman


@pytest.mark.parametrize(
    ("line", "language", "rest"),
    [
        ("[fr]le chat", "fr", "le chat"),
        ("[DE]Guten Tag", "de", "Guten Tag"),
        ("[xx]hello", "en", "[xx]hello"),
        ("[verse]", "en", "[verse]"),
        ("hello", "en", "hello"),
    ],
)
def test_a_known_language_tag_is_taken_off(line, language, rest):
    assert split_language(line) == (language, rest)


def test_lines_carry_their_language_and_spaces_are_pieces():
    assert tagged("[zh]你好 世界") == "[zh-cn]你好[SPACE]世界"
    assert tagged("[fr][chorus] la la") == "[en][chorus][SPACE]la[SPACE]la"
    assert tagged("ソング") == "[ja]songu"


def test_a_miniature_spells_lyrics_by_letters_and_pairs():
    ids = lyric_ids()
    tokenizer = LyricTokenizer.from_json(lyric_vocabulary())

    assert tokenizer.encode(["the la 2\n\n"]) == [
        START_ID,
        *(ids[piece] for piece in ("[en]", "th", "e", "[SPACE]", "l", "a", "[SPACE]", "t", "w", "o")),
        *[LINE_END_ID] * 3,
    ]
    assert tokenizer.encode([""]) == [START_ID]


def test_lyrics_without_the_vocabulary_are_refused_by_name_and_silence_is_not():
    clip = parts()[1]

    with pytest.raises(LyricVocabularyMissing, match=re.escape(VOCABULARY_FILE)):
        clip.encode_song("funk", "la la la", 1.0, vocabulary=None)
    assert clip.encode("funk").lyric_ids.tolist() == [[START_ID]]


def test_another_file_in_the_vocabularys_place_is_refused(tmp_path):
    wrong = tmp_path / "ace_step_lyrics_vocab.json"
    wrong.write_text(lyric_vocabulary())

    with pytest.raises(ModelFileUnusable, match="not the vocabulary"):
        LyricTokenizer.from_file(wrong)


@given(line=st.text(max_size=80))
def test_any_line_becomes_plain_words(line):
    written = tagged(line.strip())

    assert " " not in written
    assert '"' not in written
    assert written.startswith("[")


@given(number=st.integers(0, 10**15))
def test_any_whole_number_is_spoken_in_words(number):
    assert re.fullmatch(r"[a-z]+( [a-z]+)*", spell_numbers(str(number)))


@given(lines=st.lists(st.text("abc 12.,!", max_size=12), max_size=6))
def test_every_line_of_lyrics_ends_once(lines):
    tokenizer = LyricTokenizer.from_json(lyric_vocabulary())
    segment = "\n".join(lines)

    ids = tokenizer.encode([segment])

    ends = segment.count("\n") + 1 if segment else 0
    spaces = sum(tagged(line.strip()).count("[SPACE]") for line in lines if line.strip())
    assert ids[0] == START_ID
    assert ids.count(LINE_END_ID) == ends + spaces
