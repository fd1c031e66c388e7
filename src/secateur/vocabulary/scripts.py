"""Unicode scripts by name, such as `latin+cyrillic`, and their characters.

Unicode gives every character one script. Digits, most punctuation, symbols and emojis belong to the script `Common`,
and most combining marks to `Inherited`. Texts of every script use both, so these characters are always kept.

A normaliser can turn a character into one of another script: NFKC turns ㊀, which Unicode calls common, into the Han
character 一. It can also insert characters that the text does not contain, such as ▁ for a space. A vocabulary that
splits every text of some scripts as before must know these characters too.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from typing import Any

from fontTools.unicodedata import Scripts, script, script_code, script_name
from tokenizers import Tokenizer
from tokenizers.normalizers import Normalizer

from secateur.base.errors import SecateurError

SHARED = ("Zyyy", "Zinh")
"""Codes of the scripts `Common` and `Inherited`."""
_UNKNOWN = "Zzzz"
"""Code of characters that are unassigned or for private use."""


def parse_scripts(value: str, among: Collection[str] = ()) -> tuple[str, ...]:
    """Return the codes of scripts that a value names.

    Args:
        value: Names joined by `+`, such as `latin+old-italic`. Case, spaces, `-` and `_` do not matter.
        among: Codes of the scripts to list in the error for an unknown name; all if empty.

    Raises:
        SecateurError: A name is not a Unicode script.
    """
    codes = tuple(script_code(name, _UNKNOWN) for name in value.split("+"))
    if _UNKNOWN in codes:
        wrong = value.split("+")[codes.index(_UNKNOWN)].strip()
        known = ", ".join(sorted(map(name_of, among or Scripts.NAMES.keys() - {_UNKNOWN})))
        raise SecateurError(f"no Unicode script {wrong!r}; join names by +: {known}")
    return codes


def name_of(code: str) -> str:
    """Return the name of a script as users write it, such as `old-italic`."""
    return script_name(code).lower().replace(" ", "-")


@cache
def characters_of(codes: tuple[str, ...]) -> frozenset[str]:
    """Return all characters of some scripts, and those that Unicode calls common or inherited."""
    wanted = {*codes, *SHARED}
    ends = (*Scripts.RANGES[1:], 0x110000)
    ranges = zip(Scripts.RANGES, ends, Scripts.VALUES, strict=True)
    return frozenset(chr(point) for start, end, code in ranges if code in wanted for point in range(start, end))


def main_scripts(counts: Iterable[tuple[str, int]], share: float = 0.01) -> tuple[str, ...]:
    """Return the codes of the scripts of a text, the most frequent first.

    Args:
        counts: Parts of the text and how often each occurs.
        share: Smallest share of the characters, common and inherited ones not counted, that a script must have.
    """
    found: Counter[str] = Counter()
    for text, count in counts:
        for character in text:
            found[script(character)] += count
    for code in (*SHARED, _UNKNOWN):
        del found[code]
    return tuple(code for code, count in found.most_common() if count >= share * found.total())


_INSERTED = ("content", "prepend", "replacement")
"""Keys of text that normalisers and pre-tokenizers insert: `Replace`, `Prepend` and `Metaspace`."""


def with_normalised(characters: frozenset[str], contents: dict[str, Any]) -> frozenset[str]:
    """Return some characters, and all characters into which a tokenizer can turn them.

    The result is closed under every step of the normaliser. Most steps replace characters one by one, so each character
    is normalised alone. NFC, NFKC and SentencePiece's table also compose: they replace a sequence of characters by one.
    The parts of this character, its canonical decomposition, are then in the result. So every character whose parts are
    in the result is added.

    Args:
        characters: Characters that a text can contain.
        contents: Contents of tokenizer.json.
    """
    steps = [_normaliser(step) for step in steps_of(contents.get("normalizer")) if step["type"] != "ByteLevel"]
    found: set[str] = set()
    new = set(characters).union(*_inserted(contents.get("normalizer")), *_inserted(contents.get("pre_tokenizer")))
    while new:
        found |= new
        made = {part for step in steps for character in new for part in step.normalize_str(character)}
        new = made.union(_decomposed(new), _composed(found)) - found if steps else set()
    return frozenset(found)


def steps_of(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normaliser, pre-tokenizer or post-processor, and the steps inside sequences."""
    if not value:
        return
    inner = [step for key in ("normalizers", "pretokenizers", "processors") for step in value.get(key, ())]
    if value["type"] != "Sequence":
        yield value
    for step in inner:
        yield from steps_of(step)


def _normaliser(step: dict[str, Any]) -> Normalizer:
    """Return one step of a normaliser as an object that normalises strings."""
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    normaliser = Tokenizer.from_str(json.dumps({"version": "1.0", "normalizer": step, "model": empty})).normalizer
    assert normaliser is not None
    return normaliser


def _inserted(value: Any) -> Iterator[str]:
    """Yield the texts that a normaliser or pre-tokenizer inserts."""
    for step in steps_of(value):
        yield from (step[key] for key in _INSERTED if isinstance(step.get(key), str))


def _decomposed(characters: Iterable[str]) -> set[str]:
    """Return the parts of some characters in their canonical decomposition."""
    return {part for character in characters for part in unicodedata.normalize("NFD", character)}


def _composed(characters: set[str]) -> set[str]:
    """Return the characters whose canonical decomposition has only the given characters."""
    return {whole for whole, parts in _decompositions() if characters.issuperset(parts)}


@cache
def _decompositions() -> list[tuple[str, str]]:
    """Return all characters that have a canonical decomposition, with the decomposition."""
    # No character above this one has a decomposition.
    pairs = ((chr(point), unicodedata.normalize("NFD", chr(point))) for point in range(0x30000))
    return [(whole, parts) for whole, parts in pairs if whole != parts]
