"""Tables for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table

if TYPE_CHECKING:
    from secateur.evaluate.compare import Evaluation
    from secateur.steps.prune import Summary


def prune_table(summary: Summary, out: Path | None) -> RenderableType:
    """Before and after, and what the run took."""
    table = Table(title="Expected" if summary.dry else "Pruned", title_justify="left")
    for name in ("", "before", "after", "ratio"):
        table.add_column(name, justify="left" if not name else "right")

    def row(name: str, pair: tuple[float, float], shown: tuple[str, str]) -> None:
        table.add_row(name, *shown, f"{pair[1] / pair[0]:.3f}")

    dense, width = summary.dense, summary.width
    row("parameters", summary.parameters, tuple(f"{p / 1e6:,.2f} M" for p in summary.parameters))  # type: ignore[arg-type]
    row("weights on disk", summary.bytes, tuple(f"{b / 1e6:,.1f} MB" for b in summary.bytes))  # type: ignore[arg-type]
    row("cache per token", summary.cache_bytes, tuple(f"{b:,} B" for b in summary.cache_bytes))  # type: ignore[arg-type]
    row("query heads", (dense.heads, width.heads), (str(dense.heads), str(width.heads)))
    row("key/value heads", (dense.groups, width.groups), (str(dense.groups), str(width.groups)))
    row("channels", (dense.channels, width.channels), (str(dense.channels), str(width.channels)))
    lines: list[RenderableType] = [table]
    lines.append(
        f"{summary.sparsity:.2%} of the {summary.of}' parameters go, in {summary.blocks} blocks of one width."
        if summary.of == "blocks"
        else f"{summary.sparsity:.2%} of the model's parameters go, in {summary.blocks} blocks of one width."
    )
    if summary.note:
        lines.append(f"Note: {summary.note}.")
    begin = "rows begin with BOS" if summary.bos else "rows begin without BOS, as the tokenizer adds none"
    lines.append(f"Calibrated on {summary.tokens:,} tokens; {begin}.")
    if summary.dry:
        lines.append(f"About {summary.seconds:,.0f} s and {summary.peak_bytes / 1e9:.2f} GB beside the libraries' own.")
        if out is None:
            lines.append("Nothing was written (dry run).")
    else:
        lines.append(f"{summary.seconds:,.1f} s, peak memory {summary.peak_bytes / 1e9:.2f} GB. Written to {out}")
    return Group(*lines)


def eval_table(result: Evaluation) -> RenderableType:
    """One model's figures, or two side by side with their ratios."""
    table = Table(title="Evaluation", title_justify="left")
    names = [model.name for model in result.models]
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    if len(names) == 2:
        table.add_column("ratio", justify="right")
    for label, values, form in result.rows():
        cells = [form.format(value) for value in values]
        ratio = [f"{values[0] / values[1]:.3f}"] if len(values) == 2 and values[1] else [""] * (len(names) - 1)
        table.add_row(label, *cells, *ratio)
    begin = "rows begin with BOS" if result.models[0].bos else "rows begin without BOS, as the tokenizer adds none"
    lines: list[RenderableType] = [table]
    for text in result.models[0].texts:
        lines.append(f"{text.source}: {text.tokens:,} tokens scored in rows of {text.length}; {begin}.")
    return Group(*lines)
