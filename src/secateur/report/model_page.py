"""A pruned model as one self-contained HTML page, report.html: what was removed where, and what that did.

No script runs and nothing is fetched; whatever comes from a model or a person is escaped. All is read from the record
that `prune` writes (secateur.json).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from secateur.model.axes import Width, axis_kinds, shares
from secateur.report.card import expected_cost, loading_code, model_name, share_removed, sizes, units_kept, versions

TEMPLATE = Path(__file__).with_name("model_page.html")
CELL, HIGH = 18, 130
"""Width of a block and height of a chart, in pixels."""
LEAST = 1e-6
"""Errors below this share of the largest one are drawn as if there were none."""


def model_page(
    record: Mapping[str, Any],
    measured: Sequence[Sequence[str]] = (),
    texts: Sequence[tuple[str, str, str]] = (),
) -> str:
    """The whole page.

    Args:
        record: the contents of secateur.json.
        measured: rows of what was measured since: a label, this model's figure, the base model's, their ratio.
        texts: prompts, with what this model and the base model write behind them.
    """
    blocks = list(_blocks(record))
    name = model_name(record)
    rows = [(label, before, after, ratio) for label, before, after, ratio in sizes(record)]
    rows += [(label, base, here, ratio) for label, here, base, ratio in measured]
    parts = {
        "TITLE": f"{escape(name)}, pruned",
        "SUMMARY": escape(f"{share_removed(record)}: {units_kept(record)}. {expected_cost(record)}"),
        "FIGURES": _table(("", "before", "after", "ratio"), rows),
        "MAP": _map(blocks),
        "ERRORS": "".join(_errors(role, blocks) for role in _roles(blocks)),
        "TABLE": _table(
            ("block", "module", "stay", "of", "error before the refit", "error after"),
            [row for block in blocks for row in _rows(block)],
        ),
        "TEXTS": _texts(texts),
        "COMMAND": escape(record["command"]),
        "OPENING": escape(loading_code(record, "THIS_FOLDER")),
        "MADE": escape(versions(record)),
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    for place, text in parts.items():
        page = page.replace(f"{{{{{place}}}}}", text)
    return page


def _blocks(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the share of each module of a block that stays, by its role, and the module's report."""
    pruned = {block["block"]: block for block in record["blocks"]}
    for index, dense in enumerate(record["dense"]):
        block = pruned.get(index, {"width": dense, "modules": []})
        now, full = Width(block["width"]), Width(dense)
        roles = {axis_kinds()[axis].unit: axis_kinds()[axis].role for axis in full}
        yield {
            "index": index,
            "shares": shares(now, full),
            "modules": {roles[one["kind"]]: one for one in block["modules"]},
        }


def _roles(blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the roles of modules that some block has."""
    return list(dict.fromkeys(role for block in blocks for role in block["shares"]))


def _map(blocks: Sequence[Mapping[str, Any]]) -> str:
    """Draw a row of cells for each role, one a block: the darker, the more of the module is gone."""
    cells, roles = [], _roles(blocks)
    for row, role in enumerate(roles):
        for block in blocks:
            gone = 1 - block["shares"].get(role, 1.0)
            cells.append(
                f'<rect x="{block["index"] * CELL}" y="{row * (CELL + 4)}" width="{CELL - 2}" height="{CELL}" '
                f'class="{role}" fill-opacity="{gone:.3f}"><title>Block {block["index"]}, {role}: {gone:.0%} gone'
                "</title></rect>"
            )
    label = f"Share of each block's {' and below of its '.join(roles)} that is gone"
    return _svg(len(blocks), len(roles) * (CELL + 4) - 4, label, cells)


def _errors(role: str, blocks: Sequence[Mapping[str, Any]]) -> str:
    """For each block's module, its error before the refit and what the refit leaves, on a logarithmic scale.

    Some entries of the stream are huge from some block on, and its energy with them: shares differ by powers of ten.
    """
    found = [(block["index"], block["modules"][role]) for block in blocks if role in block["modules"]]
    values = [one[key] for _, one in found for key in ("relative_before", "relative")]
    highest = max(values, default=0.0)
    if not highest > 0:
        return ""
    lowest = min(value for value in values if value > highest * LEAST)
    span = math.log(highest / lowest) or 1.0

    def place(value: float) -> float:
        return 6 + (HIGH - 12) * math.log(highest / max(value, lowest)) / span

    marks = []
    for index, one in found:
        x, before, after = index * CELL + CELL // 2, place(one["relative_before"]), place(one["relative"])
        title = f"<title>Block {index}: {one['relative_before']:.2g} before, {one['relative']:.2g} after</title>"
        marks.append(
            f'<g>{title}<path d="M{x} {before:.1f}V{after:.1f}" class="line"/><circle cx="{x}" cy="{before:.1f}" r="4" '
            f'class="ghost"/><circle cx="{x}" cy="{after:.1f}" r="4" class="{role}"/></g>'
        )
    label = role.capitalize()
    chart = _svg(len(blocks), HIGH, f"{label}: error of each block before and after the refit", marks)
    return f"<figure><figcaption>{label}, from {highest:.1g} down to {lowest:.1g}</figcaption>{chart}</figure>"


def _svg(blocks: int, high: int, label: str, shapes: Sequence[str]) -> str:
    """A drawing a block of which is a column, with numbers below; it scrolls where the screen is narrow."""
    step = max(1, blocks // 12)
    numbers = [f'<text x="{index * CELL}" y="{high + 15}">{index}</text>' for index in range(0, blocks, step)]
    wide, tall = blocks * CELL, high + 20
    drawing = (
        f'<svg role="img" aria-label="{label}" width="{wide}" height="{tall}" viewBox="0 0 {wide} {tall}">'
        f"{''.join([*shapes, *numbers])}</svg>"
    )
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{drawing}</div>'


def _rows(block: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for one in block["modules"].values():
        counts = (f"{one['kept']:,}", f"{one['units']:,}")
        yield str(block["index"]), one["kind"], *counts, f"{one['relative_before']:.2g}", f"{one['relative']:.2g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(value)}</td>" for value in rest)}</tr>'
        for first, *rest in rows
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _texts(texts: Sequence[tuple[str, str, str]]) -> str:
    """What both models write behind some prompts, side by side."""
    if not texts:
        return ""
    pairs = "".join(
        f"<h3>{escape(prompt)}</h3><div class='pair'><div><h4>pruned</h4><p>{escape(here)}</p></div>"
        f"<div><h4>whole</h4><p>{escape(base)}</p></div></div>"
        for prompt, here, base in texts
    )
    return f'<section aria-labelledby="texts"><h2 id="texts">What they write</h2>{pairs}</section>'
