"""Plots of pruned models, as figures of matplotlib."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from secateur.base.words import format_count
from secateur.model.axes import Width, shares


def plot_widths(dense: Sequence[Width], pruned: Sequence[Width]) -> Figure:
    """Return a bar chart of the share of units that each module keeps, by block.

    Args:
        dense: Width of every block of the dense model.
        pruned: Width of every block after pruning.
    """
    figure = _figure()
    axes = figure.add_subplot()
    blocks = [shares(width, before) for width, before in zip(pruned, dense, strict=True)]
    roles = list(dict.fromkeys(role for block in blocks for role in block))
    for number, role in enumerate(roles):
        place = (number + 0.5) / len(roles) - 0.5
        bars = [index + 0.8 * place for index in range(len(dense))]
        axes.bar(bars, [block.get(role, 1.0) for block in blocks], 0.8 / len(roles), label=role)
    axes.set_xlabel("block")
    axes.set_ylabel("share of units kept")
    axes.legend(loc="lower right")
    return figure


def plot_sizes(parameters: Sequence[int], perplexity: Mapping[str, Sequence[float]], path: Path) -> None:
    """Plot perplexity over dense against the share of parameters left, one line for each text, into a file.

    Args:
        parameters: Number of parameters of each model, the dense one first.
        perplexity: Perplexity of each model, by text.
        path: The image file to write.
    """
    figure = _figure()
    axes = figure.add_subplot()
    left = [count / parameters[0] for count in parameters]
    for text, values in perplexity.items():
        axes.plot(left, [value / values[0] for value in values], marker="o", label=Path(text).name)
    axes.invert_xaxis()
    axes.set_xlabel(f"parameters, ratio to dense (dense: {format_count(parameters[0], 0)})")
    axes.set_ylabel("perplexity, ratio to dense")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def plot_training(
    tokens_per_step: float, losses: Sequence[float], perplexities: Sequence[tuple[int, float]], teacher: float | None
) -> Figure:
    """Return the course of a training: the loss, and below it perplexity on held-out rows.

    Args:
        tokens_per_step: Number of tokens of a step.
        losses: Loss of every step, in nats per token.
        perplexities: Number of steps done, and perplexity.
        teacher: Perplexity of the teacher, to which the others are ratios; None for perplexities as they are.
    """
    figure = _figure()
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot([(index + 1) * tokens_per_step for index in range(len(losses))], losses)
    above.set_ylabel("loss, nats per token")
    steps, values = zip(*perplexities, strict=True)
    below.plot([step * tokens_per_step for step in steps], [value / (teacher or 1.0) for value in values], marker="o")
    below.set_ylabel("perplexity" if teacher is None else "perplexity,\nratio to the teacher's")
    below.set_xlabel("tokens")
    return figure


class _Picture(Figure):
    """Figure that a notebook displays as a picture, also before pyplot is imported."""

    def _repr_png_(self) -> bytes:
        png = BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()


def _figure() -> Figure:
    # pyplot would keep global state and look for a screen.
    return _Picture(figsize=(6, 4), dpi=150, layout="constrained")
