"""Section of report.html about trainings: the course of the loss and of perplexity on held-out rows, as drawings."""

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.report.drawing import MARGIN, even_ticks, framed

WIDE, HIGH = 560, 130
"""Width and height of a drawing, in pixels."""
POINTS = 100
"""Largest number of points of a curve; each is the mean of as many steps as needed."""


def training_section(trainings: Sequence[Mapping[str, Any]]) -> str:
    """Return the section; an empty text for a model that was not retrained.

    Args:
        trainings: List `retrained` of the record secateur.json.
    """
    if not trainings:
        return ""
    figures = "".join(_figures(entry) for entry in trainings)
    return f'<section aria-labelledby="training"><h2 id="training">Retraining</h2>{figures}</section>'


def _figures(entry: Mapping[str, Any]) -> str:
    """Return the drawings of one training."""
    losses, measured = entry["losses"], entry["perplexities"]
    dense = entry["perplexity"]["dense"]
    step = entry["tokens"] / max(1, len(losses))
    size = -(-len(losses) // POINTS)
    means = [losses[at : at + size] for at in range(0, len(losses), size)]
    loss = [((number * size + len(part) / 2) * step, sum(part) / len(part)) for number, part in enumerate(means)]
    perplexity = [(done * step, value / (dense or 1.0)) for done, value in measured]
    what = "Perplexity on held-out rows" + ("" if dense is None else ", ratio to dense")
    tokens = float(entry["tokens"])
    return _curve("Loss of the training, nats per token", loss, tokens) + _curve(what, perplexity, tokens)


def _curve(label: str, points: Sequence[tuple[float, float]], last: float) -> str:
    """Return a figure with one curve over the number of tokens.

    Args:
        label: What the curve shows.
        points: Number of tokens and value of each point.
        last: Number of tokens of the whole training.
    """
    if not points:
        return ""
    last = last or 1.0
    low, high = min(value for _, value in points), max(value for _, value in points)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return 6 + (HIGH - 12) * (high - value) / span

    path = "M" + "L".join(f"{WIDE * at / last:.1f} {place(value):.1f}" for at, value in points)
    scale = [(place(value), f"{value:.4g}") for value in even_ticks(low, high)]
    numbers = [
        f'<text x="{WIDE * at / last:.1f}" y="{HIGH + 15}" text-anchor="{"end" if at == last else "middle"}">'
        f"{at:,.0f}</text>"
        for at in even_ticks(0.0, last)
    ]
    caption = f"{label}: from {points[0][1]:.3g} to {points[-1][1]:.3g} in {last:,.0f} tokens"
    curve = f'<path d="{path}" class="line" fill="none"/>'
    drawing = framed(WIDE, HIGH, caption, [curve, *numbers], left=scale, margin=MARGIN)
    return f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>"
