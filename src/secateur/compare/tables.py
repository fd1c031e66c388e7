"""The table of a comparison: Markdown to read, CSV and JSON to go on with. Seconds, which vary, are in JSON only."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.base.files import write_whole
from secateur.compare.comparison import Column, Comparison, Row

if TYPE_CHECKING:
    from rich.table import Table

STEM = "table"
"""`table.md`, `table.csv` and `table.json`."""
_SIZES = ("sparsity", "parameters", "heads", "channels")


def write_tables(found: Comparison, out: Path) -> None:
    """Put all three tables into a folder, each whole or not at all."""
    write_whole(out / f"{STEM}.md", markdown(found))
    write_whole(out / f"{STEM}.csv", comma_separated(found))
    write_whole(out / f"{STEM}.json", json.dumps(as_dict(found), indent=2) + "\n")


def markdown(found: Comparison) -> str:
    """The table with how it was measured; a published figure stands in parentheses."""
    head = _head(found)
    lines = [f"# {found.title}", "", *found.protocol]
    if any(row.published for row in found.rows):
        lines.append("In parentheses: what the paper gives.")
    if found.finished < found.planned:
        lines.append(f"So far {found.finished} of {found.planned} runs.")
    lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(_cells(found, row))} |" for row in found.rows]
    return "\n".join(lines) + "\n"


def comma_separated(found: Comparison) -> str:
    """One line a row; of each figure the mean, the least, the most and the published one."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    axes = list(dict.fromkeys(axis for row in found.rows for axis in row.axes))
    figures = ("", " least", " most", " published")
    names = [f"{column.name}{which}" for column in found.columns for which in figures]
    table.writerow(["model", "row", "label", *axes, "runs", *_SIZES, *names])
    for row in found.rows:
        sizes = [_number(spread.mean) if (spread := row.spread(name)) else "" for name in _SIZES]
        cells: list[Any] = []
        for column in found.columns:
            spread = row.spread(column.name)
            cells += [spread.mean, spread.least, spread.most] if spread else [""] * 3
            cells.append(row.published.get(column.name, ""))
        places = [row.axes.get(axis, "") for axis in axes]
        table.writerow([row.model, row.name, row.label, *places, len(row.results), *sizes, *cells])
    return file.getvalue()


def as_dict(found: Comparison) -> dict[str, Any]:
    """For the JSON file."""
    return {
        "title": found.title,
        "protocol": list(found.protocol),
        "planned": found.planned,
        "finished": found.finished,
        "columns": [{"name": column.name, "kind": column.kind} for column in found.columns],
        "rows": [_row(found, row) for row in found.rows],
    }


def compare_table(found: Comparison, out: Path) -> tuple[Table, list[str]]:
    """The same for the terminal."""
    from rich.table import Table

    table = Table(title=found.title, title_justify="left")
    for name in _head(found):
        table.add_column(name, justify="left" if name in ("model", "method") else "right", overflow="fold")
    for row in found.rows:
        table.add_row(*_cells(found, row))
    lines = ["In parentheses: what the paper gives."] if any(row.published for row in found.rows) else []
    return table, [*lines, f"{STEM}.md, {STEM}.csv, {STEM}.json and plots are in {out}"]


def _row(found: Comparison, row: Row) -> dict[str, Any]:
    result: dict[str, Any] = {"model": row.model, "row": row.name, "label": row.label, "axes": dict(row.axes)}
    for name in _SIZES:
        spread = row.spread(name)
        result[name] = spread and _number(spread.mean)
    result["figures"] = {column.name: _figure(column, row) for column in found.columns}
    seconds = row.spread("seconds")
    return result | {"seconds": seconds and list(seconds.values)}


def _figure(column: Column, row: Row) -> dict[str, Any]:
    spread = row.spread(column.name)
    measured = {} if spread is None else {"mean": spread.mean, "least": spread.least, "most": spread.most}
    values = {} if spread is None else {"values": list(spread.values)}
    return measured | values | {"published": row.published.get(column.name)}


def _head(found: Comparison) -> list[str]:
    several = len({row.model for row in found.rows}) > 1
    return [*["model"] * several, "method", "goes", "heads", "channels", *(column.name for column in found.columns)]


def _cells(found: Comparison, row: Row) -> list[str]:
    """A row as text."""
    several = len({other.model for other in found.rows}) > 1
    share, heads, channels = (row.spread(name) for name in ("sparsity", "heads", "channels"))
    sizes = ["" if share is None else f"{share.mean:.1%}"]
    sizes += ["" if spread is None else f"{_number(spread.mean):,}" for spread in (heads, channels)]
    return [*[row.model] * several, row.name, *sizes, *(_cell(column, row) for column in found.columns)]


def _cell(column: Column, row: Row) -> str:
    spread = row.spread(column.name)
    parts = []
    if spread is not None:
        parts.append(_text(column, spread.mean))
        if len(spread.values) > 1:
            parts.append(f"[{_text(column, spread.least)} to {_text(column, spread.most)}]")
    if column.name in row.published:
        parts.append(f"({row.published[column.name]:,.6g})")
    return " ".join(parts)


def _text(column: Column, value: float) -> str:
    """A measured figure; perplexities have no upper end."""
    if column.kind == "accuracy":
        return f"{value:.1f}"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def _number(value: float) -> float | int:
    """Whole numbers without a decimal point."""
    return int(value) if value.is_integer() else round(value, 6)
