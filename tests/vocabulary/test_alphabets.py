"""Which tokens can occur in a text of some characters."""

from itertools import product

import pytest
from fontTools.unicodedata import script
from hypothesis import given, settings
from hypothesis import strategies as st

from outputs import assert_error
from secateur.vocabulary.alphabets import Bytes, Characters, byte_characters
from secateur.vocabulary.scripts import characters_of, main_scripts, name_of, parse_scripts, with_normalised

FEW = frozenset("aé߿日🙂")
"""Characters of one, two, three and four bytes."""
TEXTS = ["".join(text).encode() for number in range(1, 5) for text in product(sorted(FEW), repeat=number)]
PARTS = {text[start:stop] for text in TEXTS for start in range(4) for stop in range(start + 1, start + 7)}
SPELLED = {number: character for character, number in byte_characters().items()}


def spelling(data: bytes) -> str:
    return "".join(SPELLED[number] for number in data)


def test_every_part_of_a_text_occurs_in_it():
    occurs = Bytes().occurs_in(FEW)
    assert all(occurs(spelling(part)) for part in PARTS)


NUMBERS = sorted({number for part in PARTS for number in part} | {0x80, 0xC2, 0xE6, 0xF0, 0xFF})


@given(st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=4).map(bytes))
@settings(max_examples=400, deadline=None)
def test_nothing_else_occurs(data):
    assert Bytes().occurs_in(FEW)(spelling(data)) == (data in PARTS)


def test_a_token_with_a_character_that_spells_no_byte_does_not_occur():
    assert not Bytes().occurs_in(FEW)("a日")
    assert Characters().occurs_in(FEW)("a日")
    assert not Characters().occurs_in(FEW)("ab")


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
    assert main_scripts([("the cat, 1984 ", 100), ("кот", 30), ("日", 1)]) == ("Latn", "Cyrl")
    assert main_scripts([("1, 2 ", 5)]) == ()


NFKC = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}
BERT = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True}


@pytest.mark.parametrize(
    ("normalizer", "given_", "made"),
    [
        (NFKC, "㊀µK①", "一μk1"),
        (NFKC, "ω\u0345\u0314", "ᾡ"),
        ({"type": "NFD"}, "é", "e\u0301"),
        ({"type": "NFC"}, "e\u0301\u0302", "éê"),
        ({"type": "Prepend", "prepend": "▁"}, "a", "▁"),
        ({"type": "Replace", "pattern": {"String": "aa"}, "content": "日"}, "a", "日"),
        (BERT | {"strip_accents": None}, "É", "e"),
    ],
)
def test_characters_after_normalisation(normalizer, given_, made):
    assert with_normalised(frozenset(given_), {"normalizer": normalizer}) >= {*given_, *made}
