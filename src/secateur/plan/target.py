"""What a pruned model may take at most, as a person writes it: `params=80%`, `bytes=60MB`, `prefill=1.5x`."""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from secateur.base.errors import SecateurError
from secateur.base.memory import UNITS

Quantity = Literal["params", "active", "bytes", "kv", "prefill", "decode", "ppl"]

_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


@dataclass(frozen=True)
class _Spelling:
    """How one quantity is written and talked about."""

    suffixes: dict[str, int]
    """Of absolute values; empty for ratios."""
    example: str
    relative: str
    """What a relative target says, the value to be filled in."""
    absolute: str = ""


_SPELLINGS: dict[Quantity, _Spelling] = {
    "params": _Spelling(_COUNTS, "params=100M or params=80%", "{} of the parameters", "{} parameters"),
    "active": _Spelling(
        _COUNTS, "active=3B or active=80%", "{} of the parameters a token meets", "{} parameters that a token meets"
    ),
    "bytes": _Spelling(UNITS, "bytes=60MB or bytes=50%", "{} of the bytes", "{}"),
    "kv": _Spelling(UNITS, "kv=12KB or kv=50%", "{} of the key/value cache", "{} of keys and values per token"),
    "prefill": _Spelling({}, "prefill=1.5x", "prompts read {} as fast"),
    "decode": _Spelling({}, "decode=1.5x", "tokens written {} as fast"),
    "ppl": _Spelling({}, "ppl=1.2x", "at most {} the perplexity"),
}
QUANTITIES: tuple[Quantity, ...] = tuple(_SPELLINGS)
SPEEDUPS: tuple[Quantity, ...] = ("prefill", "decode")
"""Whose value is by how much the result is faster."""

_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*([a-zA-Z%]*)")


@dataclass(frozen=True)
class Target:
    """The most that the result may take of one quantity.

    Raises `SecateurError` for a value that makes no sense whatever the model.
    """

    quantity: Quantity
    value: float
    """Relative: the share that stays, below 1; of times the speed-up and of perplexity the ratio, above 1.
    Absolute: parameters, bytes of the weights, or bytes of keys and values per token."""
    relative: bool

    def __post_init__(self) -> None:
        if self.quantity not in _SPELLINGS:
            raise SecateurError(f"no target '{self.quantity}'; it must be one of {', '.join(QUANTITIES)}")
        example, ratio = _SPELLINGS[self.quantity].example, not _SPELLINGS[self.quantity].suffixes
        if not math.isfinite(self.value):
            raise SecateurError(f"target {self.quantity} is {self.value}; write a number, for example {example}")
        if ratio and not self.relative:
            raise SecateurError(f"target {self.quantity} is a ratio; write for example {example}")
        if ratio and self.value <= 1:
            what = "a speed-up" if self.quantity in SPEEDUPS else "how much the perplexity may grow, over the dense one"
            raise SecateurError(f"target {self}: it is {what} and must be above 1x, for example {example}")
        if not ratio and self.relative and not 0 < self.value < 1:
            raise SecateurError(f"target {self}: the share that stays must lie between 0% and 100%: {example}")
        if not self.relative and self.value < 1:
            hint = f" (a share is written {_plain(100 * self.value)}%)" if self.value > 0 else ""
            raise SecateurError(f"target {self}: it must be at least 1{hint}, for example {example}")

    def __str__(self) -> str:
        """As it is parsed, in the shortest spelling."""
        return f"{self.quantity}={self._spelled()}"

    def describe(self) -> str:
        """For people: `80% of the parameters`, `prompts read 1.5x as fast`."""
        spelling = _SPELLINGS[self.quantity]
        return (spelling.relative if self.relative else spelling.absolute).format(self._spelled(" "))

    def _spelled(self, blank: str = "") -> str:
        suffixes = _SPELLINGS[self.quantity].suffixes
        if self.relative:
            return _plain(Decimal(str(float(self.value))) * 100) + "%" if suffixes else f"{_plain(self.value)}x"
        value = Decimal(str(float(self.value)))
        found = []
        for suffix, factor in suffixes.items():
            number = _plain(value / factor)
            if (factor == 1 or value >= factor) and float(Decimal(number) * factor) == self.value:
                found.append(number + (blank if suffix else "") + suffix)
        # Of equally short ones people use the largest.
        return min(reversed(found), key=len)


def parse_target(text: str) -> Target:
    """Read a target.

    Args:
        text: `params=100M`, `params=80%`, `bytes=60MB`, `kv=12KB`, `prefill=1.5x`, `decode=1.5x` or `ppl=1.2x`.
            Counts end in K, M, B or G, bytes in kB to GB (powers of 1000) or KiB to GiB (of 1024), in any case.

    Raises:
        SecateurError: it does not parse, or makes no sense.

    Example:
        >>> target = parse_target("bytes=60MB")
        >>> target.quantity, target.value, target.relative
        ('bytes', 60000000.0, False)
    """
    name, equals, amount = (part.strip() for part in text.partition("="))
    quantity = next((quantity for quantity in QUANTITIES if quantity == name.lower()), None)
    if quantity is None or not equals:
        known = ", ".join(QUANTITIES)
        raise SecateurError(
            f"target '{text}': write one of {known}, then = and how much of it stays, for example params=80%"
        )
    example, suffixes = f"write for example {_SPELLINGS[quantity].example}", _SPELLINGS[quantity].suffixes
    match = _NUMBER.fullmatch(amount)
    if match is None:
        raise SecateurError(f"target '{text}': '{amount}' is no number; {example}")
    number, unit = Decimal(match[1]), match[2]
    if not suffixes and unit.lower() != "x":
        raise SecateurError(f"target '{text}': {quantity} is a ratio ending in x; {example}")
    if not suffixes:
        return Target(quantity, float(number), True)
    if unit == "%":
        return Target(quantity, float(number / 100), True)
    factor = {suffix.lower(): factor for suffix, factor in suffixes.items()}.get(unit.lower())
    if factor is None:
        known = ", ".join(suffix for suffix in suffixes if suffix)
        raise SecateurError(f"target '{text}': no unit '{unit}' (there are {known}, %); {example}")
    return Target(quantity, float(number * factor), False)


def _plain(value: float | Decimal) -> str:
    """A number with all its digits and no exponent."""
    text = format(Decimal(str(value)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
