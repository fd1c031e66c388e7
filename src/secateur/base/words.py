"""Numbers and lists as text, and names of dtypes."""

import re
from collections.abc import Sequence

DTYPES = ("float32", "bfloat16", "float16")
"""Names of the dtypes in which weights can be written, and models evaluated."""


def format_count(value: float, digits: int = 2) -> str:
    """Return a number of parameters as text: in millions, such as `134.52 M`, or the plain number below a million."""
    return f"{value / 1e6:,.{digits}f} M" if value >= 1e6 else f"{value:,.0f}"


_UNITS = {"": 1, "k": 1024, "m": 1024**2, "b": 1024**3}
"""Factors of the units of a number of tokens."""


def parse_count(text: str, units: str = "kmb") -> int | None:
    """Return a number of tokens that is written as 131072, 131,072, 128k or 1M; None if the text is something else.

    Args:
        text: The text.
        units: Units that may follow the number: k (1,024), m (1,024 k), b (1,024 m).
    """
    match = re.fullmatch(rf"(\d+(?:\.\d+)?) *([{units}]?)", text.strip().replace(",", "").lower())
    # A number of more digits is no number of tokens, and may be too large for a float.
    return None if match is None or len(match[1]) > 18 else round(float(match[1]) * _UNITS[match[2]])


def joined(names: Sequence[str]) -> str:
    """Return a list in words, such as `a, b and c`.

    Args:
        names: Items of the list, at least one.
    """
    *front, last = names
    return f"{', '.join(front)} and {last}" if front else last


def first_few(names: Sequence[str], limit: int = 3) -> str:
    """Return the first names of a list and the number of the others, such as `a, b, c and 4 more`."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def first_duplicate(names: Sequence[str]) -> str | None:
    """Return the first name that occurs more than once, or None."""
    return next((name for name in names if names.count(name) > 1), None)
