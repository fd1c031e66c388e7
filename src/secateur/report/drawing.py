"""Parts of drawings in pages: a frame with a scale on the left, as SVG text."""

import math
from collections.abc import Iterable

MARGIN = 60
"""Width of the scale left of a drawing, in pixels."""
FOOT = 20
"""Height of the numbers below a drawing, in pixels."""


def framed(
    wide: int, high: int, label: str, shapes: Iterable[str], *, left: Iterable[tuple[float, str]] = (), margin: int = 0
) -> str:
    """Return a drawing with a scale on the left; it scrolls on a narrow screen.

    Args:
        wide: Width of the drawing, in pixels.
        high: Height of the drawing without the numbers below it, in pixels.
        label: Description for screen readers, escaped.
        shapes: SVG elements, the numbers below the drawing among them.
        left: Height in pixels and text of each mark of the scale on the left.
        margin: Width of the scale on the left, in pixels.
    """
    scale = "".join(
        f'<path d="M0 {y:.1f}H{wide}" class="grid"/><text x="-8" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        for y, text in left
    )
    drawing = (
        f'<svg role="img" aria-label="{label}" width="{wide + margin}" height="{high + FOOT}" '
        f'viewBox="{-margin} 0 {wide + margin} {high + FOOT}">{scale}{"".join(shapes)}</svg>'
    )
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{drawing}</div>'


def log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return powers of ten from `low` to `high`, or evenly spaced values if there is at most one power.

    Args:
        low: Smallest value that is drawn, above zero.
        high: Largest value that is drawn.
        most: Largest number of marks.

    Example:
        >>> log_ticks(0.004, 3.0), log_ticks(0.3, 0.8)
        ([0.01, 0.1, 1.0], [0.4, 0.6, 0.8])
    """
    exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    powers = [value for exponent in exponents if low <= (value := 10.0**exponent) <= high]
    return powers[:: math.ceil(len(powers) / most)] if len(powers) > 1 else even_ticks(low, high)


def even_ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten from `low` to `high`.

    Args:
        low: Smallest value that is drawn.
        high: Largest value that is drawn.
        most: Largest number of steps between the marks.

    Example:
        >>> even_ticks(0.0, 1000.0)
        [0.0, 500.0, 1000.0]
    """
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= most)
    return [round(number * step, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
