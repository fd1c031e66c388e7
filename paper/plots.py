"""Plots of a comparison: lines over an option with several numbers, or one dot per row; with spread over seeds."""

import io
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from paper.store import write
from paper.tables import AVERAGE, Column, Comparison, Row, mean


def plot_comparison(found: Comparison, out: Path) -> None:
    """Draw a plot for every option of the grid with several numbers, or one plot with a dot for each row.

    A plot has one panel for each model and column: the perplexity of every text, and the accuracy over all tasks. Lines
    and dots are means over seeds; bands and whiskers reach from the least to the largest value; crosses are figures of
    the paper.
    """
    accuracies = [column for column in found.columns if column.kind == "accuracy"]
    columns = [column for column in found.columns if column.kind == "perplexity"]
    columns += [column for column in accuracies if column.name == AVERAGE or len(accuracies) == 1]
    by_model: dict[str, list[Row]] = {}
    for row in found.rows:
        by_model.setdefault(row.model, []).append(row)
    axes = dict.fromkeys(axis for row in found.rows for axis in row.axes)
    drawn: list[str | None] = [axis for axis in axes if len(_numbers(found.rows, axis)) > 1]
    for axis in drawn or [None]:
        height = 4.0 if axis else max(3.0, 0.3 * max(map(len, by_model.values())))
        figure, panels = _panels(len(by_model), len(columns), height)
        pairs = ((model, column) for model in by_model for column in columns)
        for (model, column), panel in zip(pairs, panels, strict=True):
            if axis is None:
                _dots(panel, by_model[model], column)
            else:
                _lines(panel, by_model[model], column, axis)
            _label(panel, model, column, axis)
        _save(figure, out / f"{axis or 'rows'}.png")


def plot_magnitudes(found: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Plot mean absolute activations against depth: a panel for each place in the block, a line for each model."""
    titles = {"stream": "residual stream", "heads": "into the attention's output", "channels": "into the down layer"}
    figure, panels = _panels(1, len(titles))
    for (place, title), panel in zip(titles.items(), panels, strict=True):
        for model, blocks in found.items():
            panel.plot(range(len(blocks)), [block[place] for block in blocks], marker="o", label=model)
        panel.set_title(title)
        panel.set_xlabel("block")
        panel.set_ylabel("mean |activation|")
        panel.set_yscale("log")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    panels[0].legend()
    _save(figure, path)


def plot_graphs(found: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], tau: float, path: Path) -> None:
    """Draw the heads of each block on a circle, joined where their distance is below tau: figure 3 of the paper."""
    width = max(map(len, found.values()))
    figure, panels = _panels(len(found), width, height=6)
    for panel in panels:
        panel.axis("off")
        panel.set_aspect("equal")
    for row, (model, blocks) in enumerate(found.items()):
        for (block, distances), panel in zip(blocks.items(), panels[row * width :], strict=False):
            angles = [2 * math.pi * head / len(distances) for head in range(len(distances))]
            x, y = [math.cos(angle) for angle in angles], [math.sin(angle) for angle in angles]
            for i, j in combinations(range(len(distances)), 2):
                if distances[i][j] < tau:
                    panel.plot([x[i], x[j]], [y[i], y[j]], color="C0", linewidth=0.7)
            panel.scatter(x, y, color="C1", zorder=2)
            for head in range(len(distances)):
                panel.annotate(str(head), (1.08 * x[head], 1.08 * y[head]), ha="center", va="center")
            panel.set_title(f"{model}, block {block}: heads closer than {tau:g}")
    _save(figure, path)


def _lines(panel: Any, rows: Sequence[Row], column: Column, axis: str) -> None:
    """Draw one line for all rows that differ only in their place on the axis."""
    by_line: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if axis in row.axes:
            others = tuple((name, value) for name, value in row.axes.items() if name != axis)
            by_line.setdefault((row.label, others), []).append(row)
    # There are ten colours; further lines change their dashes too.
    styles = ("-", "--", ":")
    for number, ((label, others), members) in enumerate(by_line.items()):
        points = sorted((row.axes[axis], values) for row in members if (values := row.values(column.name)))
        if points:
            at, spreads = [place for place, _ in points], [values for _, values in points]
            name = ", ".join(filter(None, (label, *(f"{key} {value}" for key, value in others))))
            style = styles[number // 10 % 3]
            (line,) = panel.plot(at, [*map(mean, spreads)], style, marker="o", label=name)
            panel.fill_between(at, [*map(min, spreads)], [*map(max, spreads)], alpha=0.2, color=line.get_color())
            paper = [(row.axes[axis], row.published[column.name]) for row in members if column.name in row.published]
            panel.plot(*zip(*paper, strict=True), "x", color=line.get_color()) if paper else None
    if dense := rows[0].values(column.name):
        panel.axhline(mean(dense), linestyle="--", color="gray", label=rows[0].name)
    if axis in ("samples", "refit_samples"):
        panel.set_xscale("log")
        panel.minorticks_off()
    places = sorted({row.axes[axis] for row in rows if axis in row.axes})
    panel.set_xticks(places, [f"{place:g}" for place in places])
    panel.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _dots(panel: Any, rows: Sequence[Row], column: Column) -> None:
    """Draw one dot for each row, the first on top; bars need a zero, which a logarithmic scale does not have."""
    for place, row in enumerate(rows):
        if values := row.values(column.name):
            middle = mean(values)
            whiskers = [[middle - min(values)], [max(values) - middle]]
            panel.errorbar(middle, place, xerr=whiskers, fmt="o", capsize=2, color="C0")
        if column.name in row.published:
            panel.plot(row.published[column.name], place, "x", color="black")
    panel.set_yticks(range(len(rows)), [row.name for row in rows])
    panel.invert_yaxis()
    if column.kind == "perplexity":
        panel.set_xscale("log")
        _plain(panel.xaxis)


def _label(panel: Any, model: str, column: Column, axis: str | None) -> None:
    what = f"perplexity, {column.name}" if column.kind == "perplexity" else f"accuracy in %, {column.name}"
    panel.set_title(model)
    panel.set_xlabel(what if axis is None else axis)
    if axis is not None:
        panel.set_ylabel(what)
        if column.kind == "perplexity":
            panel.set_yscale("log")
            _plain(panel.yaxis)
    panel.grid(alpha=0.3)


def _plain(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers instead of powers; a longer axis gets fewer of them."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


def _numbers(rows: Sequence[Row], axis: str) -> set[float]:
    """The numbers on an axis."""
    values = {row.axes.get(axis) for row in rows} - {None}
    return {value for value in values if isinstance(value, int | float) and not isinstance(value, bool)}


def _panels(rows: int, columns: int, height: float = 4.0) -> tuple[Any, list[Any]]:
    # Not pyplot: it keeps state, and looks for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * columns, height * rows), dpi=150, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _save(figure: Any, path: Path) -> None:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    write(path, file.getvalue())
