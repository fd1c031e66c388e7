"""Pictures as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.counts import counted

if TYPE_CHECKING:
    from secateur.steps.sizes import Size


def plot_sizes(sizes: Sequence[Size], path: Path) -> None:
    """Perplexity over dense against the parameters that are left, one line a text; the dense model is the first."""
    # Not pyplot: it keeps state, and looks for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for text, dense in sizes[0].perplexity.items():
        shares = [size.parameters / sizes[0].parameters for size in sizes]
        axes.plot(shares, [size.perplexity[text] / dense for size in sizes], marker="o", label=Path(text).stem)
    axes.invert_xaxis()
    axes.set_xlabel(f"parameters over dense ({counted(sizes[0].parameters, 0)})")
    axes.set_ylabel("perplexity over dense")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
