"""Tables of a comparison: Markdown for people, CSV and JSON for programs. Times, which vary, are in the JSON only."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from secateur.base.files import write_atomically
from secateur.paper.comparison import Column, Comparison, Row

_SIZES = ("sparsity", "parameters", "heads", "channels")


def write_table(
    out: Path,
    *,
    title: str,
    notes: Sequence[str],
    shown: Sequence[Sequence[str]],
    whole: Sequence[Sequence[Any]],
    contents: dict[str, Any],
) -> None:
    """Write `table.md`, `table.csv` and `table.json` into a folder, each atomically.

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
    write_atomically(out / "table.md", "\n".join(lines) + "\n")
    write_atomically(out / "table.csv", file.getvalue())
    write_atomically(out / "table.json", json.dumps(contents, indent=2) + "\n")


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
        "protocol": list(found.protocol),
        "planned": found.planned,
        "finished": found.finished,
        "columns": [asdict(column) for column in found.columns],
        "rows": entries,
    }
    notes = [*found.protocol, *_legend(found), *so_far]
    write_table(out, title=found.title, notes=notes, shown=_shown(found), whole=whole, contents=contents)


def compare_table(found: Comparison, out: Path) -> tuple[Table, list[str]]:
    """Return the table of a comparison for the terminal, and lines to print below it."""
    head, *rows = _shown(found)
    table = Table(title=found.title, title_justify="left")
    for name in head:
        table.add_column(name, justify="left" if name in ("model", "method") else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table, [*_legend(found), f"table.md, table.csv, table.json and plots are in {out}"]


def _legend(found: Comparison) -> list[str]:
    return ["In parentheses: the figures of the paper."] if any(row.published for row in found.rows) else []


def _entry(found: Comparison, row: Row) -> dict[str, Any]:
    """Return a row for the JSON file."""
    sizes = {name: (spread := row.spread(name)) and _number(spread.mean) for name in _SIZES}
    figures = {}
    for column in found.columns:
        spread, published = row.spread(column.name), {"published": row.published.get(column.name)}
        figures[column.name] = published if spread is None else spread.as_dict() | published
    seconds = row.spread("seconds")
    about = {"model": row.model, "row": row.name, "label": row.label, "axes": dict(row.axes)}
    return about | sizes | {"figures": figures, "seconds": seconds and list(seconds.values)}


def _shown(found: Comparison) -> list[list[str]]:
    """Return head and rows of the Markdown table; published figures are in parentheses."""
    several = len({row.model for row in found.rows}) > 1
    shown = [["method", "removed", "heads", "channels", *(column.name for column in found.columns)]]
    for row in found.rows:
        share, *counts = (row.spread(name) for name in ("sparsity", "heads", "channels"))
        sizes = ["" if share is None else f"{share.mean:.1%}"]
        sizes += ["" if count is None else _count(count.mean) for count in counts]
        shown.append([row.name, *sizes, *(_cell(column, row) for column in found.columns)])
    models = ["model", *(row.model for row in found.rows)]
    return [[model, *cells] for model, cells in zip(models, shown, strict=True)] if several else shown


def _cell(column: Column, row: Row) -> str:
    spread, parts = row.spread(column.name), []
    if spread is not None:
        parts.append(_text(column, spread.mean))
        if len(spread.values) > 1:
            parts.append(f"[{_text(column, spread.least)} to {_text(column, spread.most)}]")
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


def _number(value: float) -> float | int:
    """Return a number rounded to six digits, as int where it is whole."""
    return int(value) if value.is_integer() else round(value, 6)
