"""Values of `--vocabulary`: which tokens a model keeps, as users write it."""

import re
from dataclasses import dataclass

from secateur.base.errors import SecateurError
from secateur.base.words import parse_count

ALL = "all"
"""Value with which every token is kept."""
TEXT = "text"
"""Value with which the tokens of the calibration text are kept."""


@dataclass(frozen=True)
class Wanted:
    """Tokens to keep; exactly one of the fields is set."""

    scripts: str = ""
    """Names of Unicode scripts, joined by `+`."""
    least: int = 0
    """Number of times that the calibration text must contain a token."""
    number: int = 0
    """Number of tokens."""
    share: float = 0.0
    """Share of the tokens, between 0 and 1."""


def parse_vocabulary(text: str) -> Wanted | None:
    """Return the tokens to keep; None for all.

    Args:
        text: `all`, names of scripts such as `latin+cyrillic`, `text`, `text:N`, a number such as 64k (k is
            1,024), or a share such as 50%.

    Raises:
        SecateurError: The text is none of these, or a number is out of its range.

    Example:
        >>> parse_vocabulary("64k").number
        65536
    """
    value = text.strip().lower()
    if value == ALL:
        return None
    if match := re.fullmatch(rf"{TEXT}(?::(\d+))?", value):
        wanted = Wanted(least=int(match[1] or 1))
        is_valid = wanted.least > 0
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?) *%", value):
        wanted = Wanted(share=float(match[1]) / 100)
        is_valid = 0 < wanted.share < 1
    elif (number := parse_count(value, "km")) is not None:
        wanted, is_valid = Wanted(number=number), number > 0
    else:
        wanted, is_valid = Wanted(scripts=value), re.fullmatch(r"[a-z_ -]+(\+[a-z_ -]+)*", value) is not None
    if not is_valid:
        raise SecateurError(
            f"vocabulary is '{text}'; write all, scripts such as latin or latin+cyrillic, {TEXT}, {TEXT}:5, a number "
            "of tokens such as 64k, or a share such as 50%"
        )
    return wanted
