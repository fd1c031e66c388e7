"""Tables for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from secateur.evaluate.compare import Evaluation, Figure
    from secateur.steps.summary import Summary


def prune_table(summary: Summary, out: Path) -> tuple[Table, list[str]]:
    """Before and after, and below it what the run took."""
    table = Table(title="Expected" if summary.dry else "Pruned", title_justify="left")
    for name in ("", "before", "after", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    dense, width = summary.dense, summary.width
    figures: list[tuple[str, tuple[int, int], float, str]] = [
        ("parameters", summary.parameters, 1e6, "{:,.2f} M"),
        ("weights on disk", summary.bytes, 1e6, "{:,.2f} MB"),
        ("cache per token", summary.cache_bytes, 1, "{:,.0f} B"),
        ("query heads", (dense.heads, width.heads), 1, "{:,.0f}"),
        ("key/value heads", (dense.groups, width.groups), 1, "{:,.0f}"),
        ("channels", (dense.channels, width.channels), 1, "{:,.0f}"),
    ]
    for label, (before, after), unit, form in figures:
        table.add_row(label, form.format(before / unit), form.format(after / unit), f"{after / before:.3f}")
    whose = "the pruned blocks'" if summary.of == "blocks" else "the model's"
    lines = [f"{summary.sparsity:.2%} of {whose} parameters go, in {summary.blocks} blocks of one width."]
    if summary.note:
        lines.append(f"Note: {summary.note}.")
    if summary.dry:
        lines.append(f"About {summary.seconds:,.0f} s and {summary.peak_bytes / 1e9:.2f} GB beside the libraries' own.")
        lines.append(f"Nothing was written to {out} (dry run).")
    else:
        lines.append(f"Calibrated on {summary.tokens:,} tokens; {_begin(summary.bos)}.")
        lines.append(f"{summary.seconds:,.1f} s, peak memory {summary.peak_bytes / 1e9:.2f} GB. Written to {out}")
    return table, lines


def eval_table(result: Evaluation) -> tuple[Table, list[str]]:
    """One model's figures, or two side by side with their ratios, and below them how they were measured."""
    from secateur.evaluate.compare import short

    first = result.models[0]
    names = [short(model.name) for model in result.models]
    if len(set(names)) < len(names):
        names = [model.name for model in result.models]
    table = Table(title="Evaluation", title_justify="left")
    table.add_column("")
    for name in (*names, "ratio")[: 3 if len(names) == 2 else 1]:
        table.add_column(name, justify="right", overflow="fold")
    for figure in result.figures():
        table.add_row(figure.label, *_values(figure), *_ratio(figure))
    lines = []
    for text in first.texts:
        lines.append(
            f"{short(text.source)}: {text.tokens:,} tokens scored in {text.rows:,} rows of {text.length}; "
            f"{_begin(first.bos)}."
        )
    if first.tasks:
        items = ", ".join(f"{task.name} {task.items:,} items" for task in first.tasks)
        how = "; share kept with its 95 % interval, paired by item" if len(names) == 2 else ""
        lines.append(f"Zero-shot: {items}; ± one standard error{how}.")
    if first.speed is not None:
        speed = first.speed
        lines.append(
            f"Speed: a prompt of {speed.prompt}, then {speed.new} new tokens, {speed.dtype} on {speed.device}, "
            f"{speed.threads} CPU thread{'s' * (speed.threads > 1)}; medians over {len(speed.prefill_seconds)} runs"
            + (", ratios of runs that took turns." if len(names) == 2 else ".")
        )
    return table, lines


def _values(figure: Figure) -> list[str]:
    """Each value as text, with its standard error where that is known."""
    values = [figure.form.format(value) for value in figure.values]
    errors = ["" if error is None else f" ± {figure.form.format(error)}" for error in figure.errors]
    return [value + error for value, error in zip(values, errors, strict=True)] if errors else values


def _ratio(figure: Figure) -> list[str]:
    """The ratio as text, as a share with its interval where there is one; nothing for one model."""
    if figure.ratio is None:
        return []
    if not figure.errors:
        return [f"{figure.ratio:.3f}"]
    if figure.interval is None:
        return [f"{figure.ratio:.1%}"]
    low, high = figure.interval
    return [f"{figure.ratio:.1%} ({100 * low:.1f} to {100 * high:.1f})"]


def _begin(bos: bool) -> str:
    return "rows begin with BOS" if bos else "rows begin without BOS, as the tokenizer adds none"
