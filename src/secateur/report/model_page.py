"""Page of a pruned folder, report.html: what was removed from each block, and the error after each module.

The page is one HTML file without scripts, and loads nothing. All text from models and users is escaped. The page is
made from the record of the run (secateur.json) alone.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from secateur.fit.recovery import all_recoveries
from secateur.model.axes import Width, axis_kinds, shares
from secateur.report.drawing import MARGIN, framed, log_ticks
from secateur.report.record_text import (
    chain,
    column_before,
    commands,
    expected_cost,
    last_step,
    loading_code,
    original_name,
    sizes,
    units_kept,
    versions,
)
from secateur.report.training_section import training_section

TEMPLATE = Path(__file__).with_name("model_page.html")
CELL, CHART_HEIGHT = 18, 130
"""Width of a block and height of a chart, in pixels."""
SMALLEST = 1e-6
"""Share of the largest error below which errors are drawn like zero."""


def model_page(
    record: Mapping[str, Any],
    measured: Sequence[Sequence[str]] = (),
    texts: Sequence[tuple[str, str, str]] = (),
    notes: Sequence[str] = (),
) -> str:
    """Return the complete page.

    Args:
        record: The contents of secateur.json.
        measured: Rows of figures measured after pruning: label, this model's value, the base model's value, ratio.
        texts: Prompts, each with the texts that this model and the base model generate after it.
        notes: Lines about how the figures were measured.
    """
    blocks = list(_blocks(record))
    name = original_name(record)
    rows = [*sizes(record), *((label, base, here, ratio) for label, here, base, ratio in measured)]
    lines = "".join(f"<p>{escape(note)}</p>" for note in notes)
    parts = {
        "TITLE": f"{escape(name)}, pruned",
        "SUMMARY": escape(
            f"After structured pruning: {last_step(record)}, and {units_kept(record)}. {expected_cost(record)}"
        ),
        "FIGURES": _table(("", column_before(record), "after", "ratio"), rows) + lines,
        "MAP": _map(blocks),
        "ERRORS": "".join(_errors(role, blocks) for role in _roles(blocks)),
        "RECOVERY": escape(all_recoveries()[record["options"]["recovery"]].summary),
        "TABLE": _table(
            ("block", "units", "kept", "of", "relative error"),
            [row for block in blocks for row in _rows(block)],
        ),
        "TRAINING": training_section(record.get("retrained", [])),
        "TEXTS": _texts(texts),
        "COMMAND": escape("\n".join([*(f"# {line}" for line in chain(record)), *commands(record)])),
        "OPENING": escape(loading_code(record, "THIS_FOLDER")),
        "MADE": escape(versions(record)),
    }
    # In one pass, so that braces in a user's text stay as they are.
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda place: parts[place[1]], TEMPLATE.read_text(encoding="utf-8"))


def _blocks(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield for each block the shares of units kept and the results of the fit, both by the role of the module."""
    pruned = {block["block"]: block for block in record["blocks"]}
    for index, dense in enumerate(record["dense"]):
        block = pruned.get(index, {"width": dense, "modules": []})
        width, full = Width(block["width"]), Width(dense)
        roles = {axis_kinds()[axis].unit: axis_kinds()[axis].role for axis in full}
        yield {
            "index": index,
            "shares": shares(width, full),
            "modules": {roles[one["kind"]]: one for one in block["modules"]},
        }


def _roles(blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the roles of modules that at least one block has."""
    return list(dict.fromkeys(role for block in blocks for role in block["shares"]))


def _map(blocks: Sequence[Mapping[str, Any]]) -> str:
    """Draw one row of cells for each role, one cell for each block: a darker cell means that more was removed."""
    cells, roles = [], _roles(blocks)
    for row, role in enumerate(roles):
        for block in blocks:
            removed = 1 - block["shares"].get(role, 1.0)
            cells.append(
                f'<rect x="{block["index"] * CELL}" y="{row * (CELL + 4)}" width="{CELL - 2}" height="{CELL}" '
                f'class="{role}" fill-opacity="{removed:.3f}">'
                f"<title>Block {block['index']}, {role}: {removed:.0%} removed</title></rect>"
            )
    label = f"Share removed from each block: {', below it '.join(roles)}"
    return _svg(len(blocks), len(roles) * (CELL + 4) - 4, label, cells)


def _errors(role: str, blocks: Sequence[Mapping[str, Any]]) -> str:
    """Draw the error after each block's module.

    The scale is logarithmic: in some models a few entries of the residual stream are huge from some block on, so that
    relative errors of blocks differ by powers of ten.
    """
    modules = [(block["index"], block["modules"][role]) for block in blocks if role in block["modules"]]
    values = [module["relative"] for _, module in modules]
    highest = max(values, default=0.0)
    if not highest > 0:
        return ""
    lowest = min(value for value in values if value > highest * SMALLEST)
    span = math.log(highest / lowest) or 1.0

    def place(value: float) -> float:
        return 6 + (CHART_HEIGHT - 12) * math.log(highest / max(value, lowest)) / span

    marks = []
    for index, module in modules:
        x, y = index * CELL + CELL // 2, place(module["relative"])
        title = f"<title>Block {index}: {module['relative']:.2g}</title>"
        marks.append(f'<circle cx="{x}" cy="{y:.1f}" r="4" class="{role}">{title}</circle>')
    label = role.capitalize()
    scale = [(place(value), f"{value:.3g}") for value in log_ticks(lowest, highest)]
    chart = _svg(len(blocks), CHART_HEIGHT, f"{label}: relative error, by block", marks, scale)
    return f"<figure><figcaption>{label}: relative error, by block</figcaption>{chart}</figure>"


def _svg(blocks: int, height: int, label: str, shapes: Sequence[str], scale: Sequence[tuple[float, str]] = ()) -> str:
    """Return a drawing with one column for each block and block numbers below."""
    step = max(1, blocks // 12)
    numbers = [f'<text x="{index * CELL}" y="{height + 15}">{index}</text>' for index in range(0, blocks, step)]
    return framed(blocks * CELL, height, label, [*shapes, *numbers], left=scale, margin=MARGIN)


def _rows(block: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for one in block["modules"].values():
        counts = (f"{one['kept']:,}", f"{one['units']:,}")
        yield str(block["index"]), one["kind"], *counts, f"{one['relative']:.2g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(value)}</td>" for value in rest)}</tr>'
        for first, *rest in rows
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _texts(texts: Sequence[tuple[str, str, str]]) -> str:
    """Return a section with the texts that both models generate after each prompt."""
    if not texts:
        return ""
    pairs = "".join(
        f"<h3>{escape(prompt)}</h3><div class='pair'><div><h4>pruned model</h4><p>{escape(here)}</p></div>"
        f"<div><h4>base model</h4><p>{escape(base)}</p></div></div>"
        for prompt, here, base in texts
    )
    return f'<section aria-labelledby="texts"><h2 id="texts">Generated text</h2>{pairs}</section>'
