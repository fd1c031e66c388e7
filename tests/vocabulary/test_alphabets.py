"""Which tokens can occur in a text of some characters."""

from __future__ import annotations

import unicodedata
from itertools import product
from time import perf_counter

import pytest
from fontTools.unicodedata import script
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from secateur.base.errors import SecateurError
from secateur.vocabulary.alphabets import Bytes, Characters, byte_characters
from secateur.vocabulary.normalised import with_normalised
from secateur.vocabulary.scripts import characters_of, main_scripts, name_of, parse_scripts

FEW = frozenset("aé߿日🙂")
"""Characters of one, two, three and four bytes."""
TEXTS = ["".join(text).encode() for number in range(1, 5) for text in product(sorted(FEW), repeat=number)]
PARTS = {text[start:stop] for text in TEXTS for start in range(4) for stop in range(start + 1, start + 7)}
SPELLED = {number: character for character, number in byte_characters().items()}


def spelling(data: bytes) -> str:
    return "".join(SPELLED[number] for number in data)


def test_bytes_are_spelled_as_by_gpt2() -> None:
    assert bytes_to_unicode() == SPELLED


def test_every_part_of_a_text_occurs_in_it() -> None:
    occurs = Bytes().occurs_in(FEW)
    assert all(occurs(spelling(part)) for part in PARTS)


NUMBERS = sorted({number for part in PARTS for number in part} | {0x80, 0xC2, 0xE6, 0xF0, 0xFF})


@given(st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=4).map(bytes))
@settings(max_examples=400, deadline=None)
def test_nothing_else_occurs(data: bytes) -> None:
    assert Bytes().occurs_in(FEW)(spelling(data)) == (data in PARTS)


def test_a_token_with_a_character_that_spells_no_byte_does_not_occur() -> None:
    assert not Bytes().occurs_in(FEW)("a日")
    assert Characters().occurs_in(FEW)("a日")
    assert not Characters().occurs_in(FEW)("ab")


@pytest.mark.parametrize("value", ["latin+old-italic", "Latin + Old_Italic", "LATIN+olditalic", "latin+old italic"])
def test_names_of_scripts(value: str) -> None:
    codes = parse_scripts(value)
    assert codes == ("Latn", "Ital")
    assert [name_of(code) for code in codes] == ["latin", "old-italic"]


@pytest.mark.parametrize("value", ["english", "latin+english", "", "latin+", "unknown"])
def test_an_unknown_script_lists_those_that_exist(value: str) -> None:
    with pytest.raises(SecateurError, match=r"no Unicode script .*arabic, armenian.*latin.*zanabazar-square"):
        parse_scripts(value)
    with pytest.raises(SecateurError, match=r"no Unicode script .*: greek, latin$"):
        parse_scripts(value, among=("Latn", "Grek"))


def test_characters_of_scripts() -> None:
    characters = characters_of(("Latn", "Grek"))
    assert characters == {
        character for character in map(chr, range(0x110000)) if script(character) in ("Latn", "Grek", "Zyyy", "Zinh")
    }
    assert characters.issuperset("aéẞωΩ1،,“”🙂\u0301 \n")
    assert characters.isdisjoint("бא日あ한\ue000\ud800")


def test_characters_are_found_quickly() -> None:
    start = perf_counter()
    characters_of(("Hani", "Latn"))
    assert perf_counter() - start < 1


def test_main_scripts_of_a_text() -> None:
    assert main_scripts([("the cat, 1984 ", 100), ("кот", 30), ("日", 1)]) == ("Latn", "Cyrl")
    assert main_scripts([("1, 2 ", 5)]) == ()


NFKC = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}


@pytest.mark.parametrize(
    ("normalizer", "given_", "made"),
    [
        (NFKC, "㊀µK①", "一μk1"),
        (NFKC, "ω\u0345\u0314", "ᾡ"),
        ({"type": "NFD"}, "é", "e\u0301"),
        ({"type": "NFC"}, "e\u0301\u0302", "éê"),
        ({"type": "Prepend", "prepend": "▁"}, "a", "▁"),
        ({"type": "Replace", "pattern": {"String": "aa"}, "content": "日"}, "a", "日"),
        (
            {
                "type": "BertNormalizer",
                "clean_text": True,
                "handle_chinese_chars": True,
                "strip_accents": None,
                "lowercase": True,
            },
            "É",
            "e",
        ),
    ],
)
def test_characters_after_normalisation(normalizer: dict[str, object], given_: str, made: str) -> None:
    assert with_normalised(frozenset(given_), {"normalizer": normalizer}) >= {*given_, *made}


def test_characters_that_a_pre_tokenizer_inserts() -> None:
    contents = {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}}
    assert with_normalised(frozenset("a"), contents) == {"a", "▁"}


@given(st.text(st.sampled_from(sorted(unicodedata.normalize("NFD", "ΐǖåᾧがệ") + "aωか1 ㊀Åﬁ")), max_size=8))
@settings(max_examples=200, deadline=None)
def test_composed_texts_have_known_characters(text: str) -> None:
    characters = with_normalised(frozenset(text), {"normalizer": NFKC})
    assert characters.issuperset(unicodedata.normalize("NFKC", text).lower())
