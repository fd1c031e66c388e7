"""Plot what each size costs, from the tables "Kinds of text" in docs/results.md, into docs/frontier.png.

    python benchmarks/frontier.py

The plot has the geometric mean of the perplexity ratios on all kinds of text against the share of the blocks that is
removed: one line for each model and method, the mean over its seeds.
"""

import re
from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean

from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
ROW = re.compile(r"(?:(\w+): )?(\d+) %, ([^,]+)(?:, seed \d)?")
"""First cell of a row: the model (SmolLM2 has none), the share removed in percent, the method."""
TOP = 6.0
"""Largest ratio that is drawn."""


def ratios(page: str) -> dict[tuple[str, str], dict[int, list[float]]]:
    """Return the mean ratios by model and method, then by percent removed, one for each seed."""
    section = page.split("## Kinds of text")[1].split("\n## ")[0]
    found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        match = ROW.fullmatch(cells[0]) if cells else None
        # The first table has the calibration text in its second column.
        if match and (len(cells) == 14 or cells[1] == "`general`"):
            found[match[1] or "SmolLM2", match[3]][int(match[2])].append(float(cells[-5]))
    return found


def main() -> None:
    """Draw the plot."""
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for (model, method), sizes in ratios((DOCS / "results.md").read_text(encoding="utf-8")).items():
        points = [(0, 1.0), *((share, geometric_mean(values)) for share, values in sorted(sizes.items()))]
        shares, means = zip(*points, strict=True)
        own = method == "secateur"
        label = f"{model}, {method}" if own or model == "SmolLM2" else None
        if label is not None:
            axes.plot(shares, means, "o-" if own else "o:", label=label, linewidth=2 if own else 1)
    axes.set_ylim(0.95, TOP)
    axes.set_xlabel("share of the blocks' parameters removed, percent")
    axes.set_ylabel("perplexity, ratio to dense")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(DOCS / "frontier.png")


if __name__ == "__main__":
    main()
