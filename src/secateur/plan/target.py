"""Targets: upper bounds on the size, speed or perplexity of the pruned model, as users write them.

Examples are `params=80%`, `bytes=60MB` and `prefill=1.5x`.
"""

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
    """Notation of one quantity in targets and in messages."""

    suffixes: dict[str, int]
    """Factors of the units of absolute values, by suffix; empty for quantities that are ratios to the dense model."""
    example: str
    """Example for error messages."""
    relative: str
    """Description of a relative target, with `{}` for the value."""
    absolute: str = ""
    """Description of an absolute target, with `{}` for the value."""

    @property
    def is_ratio(self) -> bool:
        """Whether values are ratios to the dense model, such as `1.5x`."""
        return not self.suffixes

    @property
    def relative_unit(self) -> tuple[str, int]:
        """Unit of relative values, and the factor by which it multiplies them."""
        return ("x", 1) if self.is_ratio else ("%", 100)


_SPELLINGS: dict[Quantity, _Spelling] = {
    "params": _Spelling(_COUNTS, "params=100M or params=80%", "{} of the parameters", "{} parameters"),
    "active": _Spelling(
        _COUNTS, "active=3B or active=80%", "{} of the active parameters", "{} active parameters per token"
    ),
    "bytes": _Spelling(UNITS, "bytes=60MB or bytes=50%", "{} of the bytes", "{}"),
    "kv": _Spelling(UNITS, "kv=12KB or kv=50%", "{} of the KV cache", "{} of KV cache per token"),
    "prefill": _Spelling({}, "prefill=1.5x", "prefill {} as fast"),
    "decode": _Spelling({}, "decode=1.5x", "decoding {} as fast"),
    "ppl": _Spelling({}, "ppl=1.2x", "at most {} the perplexity"),
}
QUANTITIES: tuple[Quantity, ...] = tuple(_SPELLINGS)
SPEEDUPS: tuple[Quantity, ...] = ("prefill", "decode")
"""Quantities whose value is a speed-up over the dense model."""

_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*([a-zA-Z%]*)")


@dataclass(frozen=True)
class Target:
    """Upper bound on one quantity of the pruned model.

    Raises:
        SecateurError: The value is not possible for any model.
    """

    quantity: Quantity
    """Name of the quantity."""
    value: float
    """Value of the bound.

    Relative: the share of the dense model's value that is kept, below 1; for `prefill` and `decode` the speed-up, and
    for `ppl` the ratio to the dense model's perplexity, above 1. Absolute: parameters, bytes of the weights, or bytes
    of the KV cache per token.
    """
    relative: bool
    """Whether the value is relative to the dense model."""

    def __post_init__(self) -> None:
        example = f"for example {_SPELLINGS[self.quantity].example}"
        if not math.isfinite(self.value):
            raise SecateurError(f"target {self.quantity} is {self.value}; write a number, {example}")
        if (problem := self._problem()) is not None:
            raise SecateurError(f"target {self}: {problem}, {example}")

    def _problem(self) -> str | None:
        """Return what is wrong with the value; None if it is possible."""
        if not self.relative:
            share = f" (write {_plain(100 * Decimal(str(self.value)))}% for a share)" if 0 < self.value < 1 else ""
            return None if self.value >= 1 else f"the value must be at least 1{share}"
        if _SPELLINGS[self.quantity].is_ratio:
            ratio = "speed-up" if self.quantity in SPEEDUPS else "ratio to the dense model's perplexity"
            return None if self.value > 1 else f"the {ratio} must be above 1x"
        return None if 0 < self.value < 1 else "the share to keep must lie between 0% and 100%"

    def __str__(self) -> str:
        """Return the target in its shortest notation; `parse_target` reads it back."""
        return f"{self.quantity}={self._format_value()}"

    def describe(self) -> str:
        """Return a description for users, such as `80% of the parameters` or `prefill 1.5x as fast`."""
        spelling = _SPELLINGS[self.quantity]
        return (spelling.relative if self.relative else spelling.absolute).format(self._format_value(" "))

    def _format_value(self, space: str = "") -> str:
        """Return the value with its unit, with `space` between the two."""
        spelling, value = _SPELLINGS[self.quantity], Decimal(str(float(self.value)))
        if self.relative:
            unit, factor = spelling.relative_unit
            return _plain(value * factor) + unit
        notations = []
        for suffix, factor in spelling.suffixes.items():
            number = _plain(value / factor)
            if (factor == 1 or value >= factor) and float(Decimal(number) * factor) == self.value:
                notations.append(number + (space if suffix else "") + suffix)
        # Among equally short notations, the one with the largest unit is the usual one.
        return min(reversed(notations), key=len)


def parse_target(text: str) -> Target:
    """Parse a target.

    Args:
        text: A quantity and its value, such as `params=100M`, `params=80%`, `bytes=60MB`, `kv=12KB`, `prefill=1.5x`,
            `decode=1.5x` or `ppl=1.2x`. Numbers of parameters may end in K, M, B or G. Bytes end in kB, MB or GB
            (powers of 1000) or in KiB, MiB or GiB (powers of 1024). Upper and lower case are equivalent.

    Raises:
        SecateurError: The text cannot be parsed, or the value is not possible for any model.

    Example:
        >>> target = parse_target("bytes=60MB")
        >>> target.quantity, target.value, target.relative
        ('bytes', 60000000.0, False)
    """
    name, equals, amount = (part.strip() for part in text.partition("="))
    quantity = next((quantity for quantity in QUANTITIES if quantity == name.lower()), None)
    if quantity is None or not equals:
        raise SecateurError(
            f"target '{text}': write one of {', '.join(QUANTITIES)}, then = and the largest value, for example "
            "params=80%"
        )
    spelling = _SPELLINGS[quantity]
    example = f"write for example {spelling.example}"
    match = _NUMBER.fullmatch(amount)
    if match is None:
        raise SecateurError(f"target '{text}': '{amount}' is not a number; {example}")
    number, unit = Decimal(match[1]), match[2].lower()
    relative_unit, divisor = spelling.relative_unit
    if unit == relative_unit:
        return Target(quantity, float(number / divisor), True)
    factors = {suffix.lower(): factor for suffix, factor in spelling.suffixes.items()}
    if unit not in factors:
        units = ", ".join([*filter(None, spelling.suffixes), relative_unit])
        raise SecateurError(f"target '{text}': '{match[2]}' is not a unit of {quantity} (use {units}); {example}")
    return Target(quantity, float(number * factors[unit]), False)


def _plain(value: float | Decimal) -> str:
    """Format a number with all its digits and without exponent."""
    text = format(Decimal(str(value)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
