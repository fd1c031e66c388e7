"""Pictures as files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from secateur.base.words import counted
from secateur.model.structure import Width


def plot_widths(dense: Sequence[Width], now: Sequence[Width]) -> Figure:
    """What stays of each block, as shares of its heads and of its channels or experts."""
    figure = _figure()
    axes = figure.add_subplot()
    heads = [width.heads / before.heads for width, before in zip(now, dense, strict=True)]
    fed = [width.fed_share(before) for width, before in zip(now, dense, strict=True)]
    for shares, place, label in ((heads, -0.2, "heads"), (fed, 0.2, "feed-forward")):
        axes.bar([index + place for index in range(len(dense))], shares, 0.4, label=label)
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
    axes.set_xlabel(f"parameters over dense ({counted(parameters[0], 0)})")
    axes.set_ylabel("perplexity over dense")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
