"""Characters that a tokenizer meets once it has normalised a text.

A normaliser can turn a character into one of another script: NFKC turns ㊀, which Unicode calls common, into the Han
character 一. It can also insert characters that the text does not contain, such as ▁ for a space. A vocabulary that
splits every text of some scripts as before must know these characters too.
"""

import json
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from tokenizers import Tokenizer
from tokenizers.normalizers import Normalizer

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
