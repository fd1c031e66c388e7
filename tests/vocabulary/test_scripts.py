"""Scripts and their characters, and which tokens can occur in a text of some characters."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from fontTools.unicodedata import script
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from outputs import assert_error
from secateur.vocabulary.models import Bpe
from secateur.vocabulary.scripts import characters_of, main_scripts, name_of, parse_scripts, with_normalised
from secateur.vocabulary.tokenizer import StoredTokenizer, byte_characters

FEW = frozenset("aé߿日🙂")
"""Characters of one, two, three and four bytes."""
TEXTS = ["".join(text).encode() for number in range(1, 5) for text in product(sorted(FEW), repeat=number)]
PARTS = {text[start:stop] for text in TEXTS for start in range(4) for stop in range(start + 1, start + 7)}
SPELLED = {number: character for character, number in byte_characters().items()}
NUMBERS = sorted({number for part in PARTS for number in part} | {0x80, 0xC2, 0xE6, 0xF0, 0xFF})


def occurring(spellings: list[str], byte_level: bool = True) -> set[str]:
    """Return the tokens of a vocabulary that occur in a text of the few characters."""
    contents: dict[str, Any] = {"pre_tokenizer": {"type": "ByteLevel"} if byte_level else None}
    model = Bpe({"vocab": {}}, dict(enumerate(spellings)), [])
    found = StoredTokenizer(Path(), contents, {}, model, {}).occurring(FEW)
    return {spellings[token] for token in found}


def spelling(data: bytes) -> str:
    return "".join(SPELLED[number] for number in data)


def test_every_part_of_a_text_occurs_in_it():
    parts = {spelling(part) for part in PARTS}
    assert occurring(sorted(parts)) == parts


@given(st.lists(st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=4).map(bytes), min_size=20, max_size=20))
@settings(max_examples=40, deadline=None)
def test_nothing_else_occurs(tokens):
    assert occurring(list(map(spelling, tokens))) == {spelling(data) for data in tokens if data in PARTS}


def test_a_token_with_a_character_that_spells_no_byte_does_not_occur():
    assert occurring(["a日", "a"]) == {"a"}
    assert occurring(["a日", "ab"], byte_level=False) == {"a日"}


@pytest.mark.parametrize("value", ["latin+old-italic", "Latin + Old_Italic", "LATIN+olditalic", "latin+old italic"])
def test_names_of_scripts(value):
    codes = parse_scripts(value)
    assert codes == ("Latn", "Ital")
    assert [name_of(code) for code in codes] == ["latin", "old-italic"]


@pytest.mark.parametrize("value", ["english", "latin+english", "", "latin+", "unknown"])
def test_an_unknown_script_lists_those_that_exist(value):
    assert_error(r"no Unicode script .*arabic, armenian.*latin.*zanabazar-square", parse_scripts, value)
    assert_error(r"no Unicode script .*: greek, latin$", parse_scripts, value, among=("Latn", "Grek"))


def test_characters_of_scripts():
    characters = characters_of(("Latn", "Grek"))
    assert characters == {
        character for character in map(chr, range(0x110000)) if script(character) in ("Latn", "Grek", "Zyyy", "Zinh")
    }
    assert characters.issuperset("aéẞωΩ1،,“”🙂\u0301 \n")
    assert characters.isdisjoint("бא日あ한\ue000\ud800")


def test_main_scripts_of_a_text():
    assert main_scripts([("the cat, 1984 ", 100), ("кот", 30), ("日", 1)], 0.01) == ("Latn", "Cyrl")
    assert main_scripts([("1, 2 ", 5)], 0.01) == ()


NFKC = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])


@pytest.mark.parametrize(
    ("normaliser", "given_", "made"),
    [
        (NFKC, "㊀µK①", "一μk1"),
        (NFKC, "ω\u0345\u0314", "ᾡ"),
        (normalizers.NFD(), "é", "e\u0301"),
        (normalizers.NFC(), "e\u0301\u0302", "éê"),
        (normalizers.Prepend("▁"), "a", "▁"),
        (normalizers.BertNormalizer(), "É", "e"),
        (None, "e\u0301", "e"),
    ],
)
def test_characters_after_normalisation(normaliser, given_, made):
    assert with_normalised(frozenset(given_), normaliser) >= {*given_, *made}
