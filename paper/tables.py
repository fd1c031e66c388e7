"""Results of a comparison, and its tables: Markdown for people, CSV and JSON for programs.

Times, which vary, are in the JSON only.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rich.table import Table

from paper.store import write

AVERAGE = "average"
"""Column of the mean accuracy over all tasks."""
_SIZES = ("sparsity", "parameters", "heads", "channels")


@dataclass(frozen=True)
class Column:
    """Quantity that is measured of every model."""

    name: str
    kind: Literal["perplexity", "accuracy"]
    """Kind of the quantity; accuracy is in percent."""


@dataclass(frozen=True)
class Row:
    """Results of one method on one model; the dense model has a row too."""

    model: str
    name: str
    label: str
    """Name of the method, without its place in the grid."""
    axes: Mapping[str, Any]
    """Place in the grid: values by option, without the seed."""
    results: list[dict[str, Any]]
    """Results of the finished seeds; empty for a row that only the paper measured."""
    published: Mapping[str, float]
    """Figures of the paper by column."""

    def values(self, column: str) -> list[float]:
        """Return the measured values of a size, text or task over the seeds."""
        found = []
        for result in self.results:
            accuracy = result["accuracy"]
            figures = result | result["perplexity"] | accuracy
            if accuracy:
                figures[AVERAGE] = sum(accuracy.values()) / len(accuracy)
            found += [float(figures[column])] if column in figures else []
        return found


@dataclass(frozen=True)
class Comparison:
    """All rows of a recipe."""

    title: str
    protocol: list[str]
    """Sentences about how everything was measured."""
    columns: list[Column]
    rows: list[Row]
    planned: int
    """Number of all runs, dense models included."""
    failed: list[str]
    """Error messages of runs that failed."""

    @property
    def finished(self) -> int:
        """Number of finished runs."""
        return sum(len(row.results) for row in self.rows)


def mean(values: Sequence[float]) -> float:
    """Return the mean, kept between the smallest and the largest value in spite of rounding."""
    return min(max(fmean(values), min(values)), max(values))


def write_table(
    out: Path,
    *,
    title: str,
    notes: Sequence[str],
    shown: Sequence[Sequence[str]],
    whole: Sequence[Sequence[Any]],
    contents: dict[str, Any],
) -> None:
    """Write `table.md`, `table.csv` and `table.json` into a folder.

    Args:
        out: The folder.
        title: Title of the Markdown table.
        notes: Lines above the Markdown table.
        shown: Rows of the Markdown table, the head first.
        whole: Rows of the CSV, the head first.
        contents: Contents of the JSON file.
    """
    head, *rows = (f"| {' | '.join(cells)} |" for cells in shown)
    lines = [f"# {title}", "", *notes, "", head, "|" + "---|" * len(shown[0]), *rows]
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(whole)
    write(out / "table.md", "\n".join(lines) + "\n")
    write(out / "table.csv", file.getvalue())
    write(out / "table.json", json.dumps(contents, indent=2) + "\n")


def write_tables(found: Comparison, out: Path) -> None:
    """Write the tables of a comparison, with the mean, least, largest and published value of each figure."""
    entries = [_entry(found, row) for row in found.rows]
    axes = list(dict.fromkeys(axis for row in found.rows for axis in row.axes))
    names = [f"{column.name}{which}" for column in found.columns for which in ("", " least", " most", " published")]
    whole: list[list[Any]] = [["model", "row", "label", *axes, "runs", *_SIZES, *names]]
    for row, entry in zip(found.rows, entries, strict=True):
        figures = [entry["figures"][column.name] for column in found.columns]
        cells = [figure.get(key) for figure in figures for key in ("mean", "least", "most", "published")]
        places, sizes = [row.axes.get(axis) for axis in axes], [entry[size] for size in _SIZES]
        whole.append([row.model, row.name, row.label, *places, len(row.results), *sizes, *cells])
    so_far = [f"So far {found.finished} of {found.planned} runs."] if found.finished < found.planned else []
    contents = {
        "title": found.title,
        "protocol": found.protocol,
        "planned": found.planned,
        "finished": found.finished,
        "columns": [asdict(column) for column in found.columns],
        "rows": entries,
    }
    notes = [*found.protocol, *_legend(found), *so_far]
    write_table(out, title=found.title, notes=notes, shown=_shown(found), whole=whole, contents=contents)


def terminal_table(found: Comparison) -> tuple[Table, list[str]]:
    """Return the table of a comparison for the terminal, and lines to print below it."""
    head, *rows = _shown(found)
    table = Table(title=found.title, title_justify="left")
    for name in head:
        table.add_column(name, justify="left" if name in ("model", "method") else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table, _legend(found)


def _legend(found: Comparison) -> list[str]:
    return ["In parentheses: the figures of the paper."] if any(row.published for row in found.rows) else []


def _entry(found: Comparison, row: Row) -> dict[str, Any]:
    """Return a row for the JSON file."""
    figures: dict[str, dict[str, Any]] = {}
    for column in found.columns:
        values, published = row.values(column.name), {"published": row.published.get(column.name)}
        spread = {"mean": mean(values), "least": min(values), "most": max(values), "values": values} if values else {}
        figures[column.name] = spread | published
    sizes: dict[str, float | None] = {}
    for name in _SIZES:
        size = mean(values) if (values := row.values(name)) else None
        sizes[name] = size if size is None else int(size) if size.is_integer() else round(size, 6)
    about = {"model": row.model, "row": row.name, "label": row.label, "axes": dict(row.axes)}
    return about | sizes | {"figures": figures, "seconds": row.values("seconds") or None}


def _shown(found: Comparison) -> list[list[str]]:
    """Return head and rows of the Markdown table; published figures are in parentheses."""
    several = len({row.model for row in found.rows}) > 1
    shown = [["method", "removed", "heads", "channels", *(column.name for column in found.columns)]]
    for row in found.rows:
        share, *counts = (row.values(name) for name in ("sparsity", "heads", "channels"))
        sizes = [f"{mean(share):.1%}" if share else ""]
        sizes += [_count(mean(count)) if count else "" for count in counts]
        shown.append([row.name, *sizes, *(_cell(column, row) for column in found.columns)])
    models = ["model", *(row.model for row in found.rows)]
    return [[model, *cells] for model, cells in zip(models, shown, strict=True)] if several else shown


def _cell(column: Column, row: Row) -> str:
    values, parts = row.values(column.name), []
    if values:
        parts.append(_text(column, mean(values)))
        if len(values) > 1:
            parts.append(f"[{_text(column, min(values))} to {_text(column, max(values))}]")
    if column.name in row.published:
        parts.append(f"({row.published[column.name]:,.6g})")
    return " ".join(parts)


def _text(column: Column, value: float) -> str:
    """Return a measured figure as text, with fewer digits for large perplexities."""
    if column.kind == "accuracy":
        return f"{value:.1f}"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def _count(value: float) -> str:
    """Return a mean number of units as text, with a decimal where it is not whole."""
    return f"{value:,.0f}" if value.is_integer() else f"{value:,.1f}"
