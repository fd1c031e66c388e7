"""Pictures as files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from secateur.base.words import counted


def plot_sizes(parameters: Sequence[int], perplexity: Mapping[str, Sequence[float]], path: Path) -> None:
    """Perplexity over dense against the parameters that are left, one line a text; the dense model is the first."""
    # Not pyplot: it keeps state, and looks for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
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
