"""Page of a pruned folder, report.html: what was removed from each block, and the error after each module.

model_page.html is the page, without its figures. It is one HTML file without scripts, and loads nothing. It is filled
from the record of the run (secateur.json) alone.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from secateur.model.axes import Width, axis_kinds, shares
from secateur.report.record_text import statements
from secateur.report.template import fill

CELL, CURVE_WIDTH, CHART_HEIGHT = 18, 560, 130
"""Width of a block, width of a curve and height of a chart, in pixels."""
SMALLEST = 1e-6
"""Share of the largest error below which errors are drawn like zero."""
POINTS = 100
"""Largest number of points of a curve; each is the mean of as many steps as needed."""


class Chart(NamedTuple):
    """Drawing with a scale on the left; places are in pixels."""

    label: str
    scale: list[tuple[float, str]]
    """Height and text of each mark of the scale."""
    marks: Sequence[tuple[float, ...]]
    """Index of each block, place and value of its error; or the places of the points of a curve."""
    numbers: Sequence[tuple[float, str]] = ()
    """Place and text of each number below a curve."""


def model_page(
    record: Mapping[str, Any],
    measured: Sequence[Sequence[str]] = (),
    texts: Sequence[tuple[str, str, str]] = (),
    notes: Sequence[str] = (),
) -> str:
    """Return the complete page.

    Args:
        record: The contents of secateur.json.
        measured: Rows of figures measured after pruning: label, this model's value, the base model's value, ratio.
        texts: Prompts, each with the texts that this model and the base model generate after it.
        notes: Lines about how the figures were measured.
    """
    blocks = list(_blocks(record))
    roles = list(dict.fromkeys(role for block in blocks for role in block["shares"]))
    return fill(
        "model_page.html",
        **statements(record, measured),
        notes=notes,
        blocks=blocks,
        roles=roles,
        cell=CELL,
        curve_width=CURVE_WIDTH,
        chart_height=CHART_HEIGHT,
        errors={role: chart for role in roles if (chart := _errors(role, blocks)) is not None},
        curves=[curve for training in record.get("retrained", []) for curve in _curves(training)],
        texts=texts,
    )


def _blocks(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield for each block the shares of units kept and the results of the fit, both by the role of the module."""
    pruned = {block["block"]: block for block in record["blocks"]}
    for index, dense in enumerate(record["dense"]):
        block = pruned.get(index, {"width": dense, "modules": []})
        width, full = Width(block["width"]), Width(dense)
        roles = {axis_kinds()[axis].unit: axis_kinds()[axis].role for axis in full}
        yield {
            "index": index,
            "shares": shares(width, full),
            "modules": {roles[one["kind"]]: one for one in block["modules"]},
        }


def _errors(role: str, blocks: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Return the error after each block's module; None if there is none.

    The scale is logarithmic: in some models a few entries of the residual stream are huge from some block on, so that
    relative errors of blocks differ by powers of ten.
    """
    modules = [(block["index"], block["modules"][role]) for block in blocks if role in block["modules"]]
    values = [module["relative"] for _, module in modules]
    highest = max(values, default=0.0)
    if not highest > 0:
        return None
    lowest = min(value for value in values if value > highest * SMALLEST)
    span = math.log(highest / lowest) or 1.0

    def place(value: float) -> float:
        return 6 + (CHART_HEIGHT - 12) * math.log(highest / max(value, lowest)) / span

    marks = [(index, place(module["relative"]), module["relative"]) for index, module in modules]
    scale = [(place(value), f"{value:.3g}") for value in log_ticks(lowest, highest)]
    return Chart(role.capitalize(), scale, marks)


def _curves(training: Mapping[str, Any]) -> Iterator[Chart]:
    """Yield the loss of one training, an entry of `retrained` in secateur.json, and perplexity on held-out rows."""
    losses, teacher, tokens = training["losses"], training["perplexity"]["teacher"], float(training["tokens"])
    step = tokens / max(1, len(losses))
    size = -(-len(losses) // POINTS)
    means = [losses[at : at + size] for at in range(0, len(losses), size)]
    loss = [((number * size + len(part) / 2) * step, sum(part) / len(part)) for number, part in enumerate(means)]
    perplexity = [(done * step, value / (teacher or 1.0)) for done, value in training["perplexities"]]
    what = "Perplexity on held-out rows" + ("" if teacher is None else ", ratio to that of the teacher")
    for label, points in (("Loss of the training, nats per token", loss), (what, perplexity)):
        if points:
            yield _curve(label, points, tokens)


def _curve(label: str, points: Sequence[tuple[float, float]], last: float) -> Chart:
    """Return a curve over the number of tokens.

    Args:
        label: What the curve shows.
        points: Number of tokens and value of each point.
        last: Number of tokens of the whole training.
    """
    last = last or 1.0
    low, high = min(value for _, value in points), max(value for _, value in points)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return 6 + (CHART_HEIGHT - 12) * (high - value) / span

    return Chart(
        f"{label}: from {points[0][1]:.3g} to {points[-1][1]:.3g} in {last:,.0f} tokens",
        scale=[(place(value), f"{value:.4g}") for value in even_ticks(low, high)],
        marks=[(CURVE_WIDTH * at / last, place(value)) for at, value in points],
        numbers=[(CURVE_WIDTH * at / last, f"{at:,.0f}") for at in even_ticks(0.0, last)],
    )


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
