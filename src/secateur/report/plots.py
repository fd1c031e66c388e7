"""Pictures as files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from secateur.base.words import format_count
from secateur.model.axes import Width, shares


def plot_widths(dense: Sequence[Width], now: Sequence[Width]) -> Figure:
    """What stays of each block, as shares of its heads and of its channels or experts."""
    figure = _figure()
    axes = figure.add_subplot()
    blocks = [shares(width, before) for width, before in zip(now, dense, strict=True)]
    roles = list(dict.fromkeys(role for block in blocks for role in block))
    for number, role in enumerate(roles):
        place = (number + 0.5) / len(roles) - 0.5
        bars = [index + 0.8 * place for index in range(len(dense))]
        axes.bar(bars, [block.get(role, 1.0) for block in blocks], 0.8 / len(roles), label=role)
    axes.set_xlabel("block")
    axes.set_ylabel("share that stays")
    axes.legend(loc="lower right")
    return figure


def _figure() -> Figure:
    # Not pyplot: it keeps state, and looks for a screen.
    return Figure(figsize=(6, 4), dpi=150, layout="constrained")


def plot_sizes(parameters: Sequence[int], perplexity: Mapping[str, Sequence[float]], path: Path) -> None:
    """Perplexity over dense against the parameters that are left, one line a text; the dense model is the first."""
    figure = _figure()
    axes = figure.add_subplot()
    shares = [count / parameters[0] for count in parameters]
    for text, values in perplexity.items():
        axes.plot(shares, [value / values[0] for value in values], marker="o", label=Path(text).stem)
    axes.invert_xaxis()
    axes.set_xlabel(f"parameters over dense ({format_count(parameters[0], 0)})")
    axes.set_ylabel("perplexity over dense")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
