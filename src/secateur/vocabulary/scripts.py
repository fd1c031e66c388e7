"""Unicode scripts by name, such as `latin+cyrillic`, and their characters.

Unicode gives every character one script. Digits, most punctuation, symbols and emojis belong to the script `Common`,
and most combining marks to `Inherited`. Texts of every script use both, so these characters are always kept.
"""

import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable

from fontTools.unicodedata import Scripts, script, script_code, script_name
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


def characters_of(codes: Collection[str]) -> frozenset[str]:
    """Return all characters of some scripts, and those that Unicode calls common or inherited."""
    ends = (*Scripts.RANGES[1:], 0x110000)
    ranges = zip(Scripts.RANGES, ends, Scripts.VALUES, strict=True)
    return frozenset(
        chr(point) for start, end, code in ranges if code in (*codes, *SHARED) for point in range(start, end)
    )


def main_scripts(counts: Iterable[tuple[str, int]], share: float) -> tuple[str, ...]:
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


def with_normalised(characters: frozenset[str], normaliser: Normalizer | None) -> frozenset[str]:
    """Return some characters, and the characters that a tokenizer's normaliser makes of a text of them.

    A normaliser can turn a character into one of another script: NFKC turns ㊀, which Unicode calls common, into the
    Han character 一. It can also compose several characters into one, whose canonical decomposition these are.
    """
    if normaliser is None:
        return characters
    made = characters.union(*map(normaliser.normalize_str, characters))
    # No character above this one has a decomposition.
    return made | {one for one in map(chr, range(0x30000)) if made.issuperset(unicodedata.normalize("NFD", one))}
