"""Tables for the terminal."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from secateur.base.words import format_count
from secateur.formats.format import format_class
from secateur.measure.figures import Evaluation, Figure, short
from secateur.model.axes import Width, axis_kinds, shares, totals
from secateur.report.summary import ModelSize, Proposal, Summary, SurveySummary, pruned_part


def prune_table(summary: Summary, out: Path) -> tuple[Table, list[str]]:
    """Before and after, and below it what the run took."""
    table = Table(title="Expected" if summary.is_dry_run else "Pruned", title_justify="left")
    for name in ("", "before", "after", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    dense, now = summary.dense, summary.pruned_widths()
    units, left = totals(dense), totals(now)
    figures: list[tuple[str, tuple[int, int], Callable[[int], str]]] = [
        ("parameters", summary.parameters, format_count),
        ("weights on disk", summary.bytes, lambda value: f"{value / 1e6:,.2f} MB"),
        ("cache per token", summary.cache_bytes, "{:,} B".format),
        *((label, (before, left[label]), "{:,}".format) for label, before in units.items()),
    ]
    for label, (before, after), form in figures:
        table.add_row(label, form(before), form(after), f"{after / before:.3f}" if before else "")
    lines = [f"{_goes(summary.sparsity, summary.blocks)}, {_where(summary)}."]
    lines += [] if summary.uniform else profile(list(dense), now)
    if summary.note:
        lines.append(f"Note: {summary.note}.")
    if summary.is_dry_run:
        lines.append(f"About {summary.seconds:,.0f} s and {summary.peak_bytes / 1e9:.2f} GB beside the libraries' own.")
        if len(summary.effort_seconds) > 1:
            every = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in summary.effort_seconds.items())
            lines.append(f"With --effort: {every}.")
        lines.append(f"Nothing was written to {out} (dry run).")
    else:
        lines.append(f"Calibrated on {summary.tokens:,} tokens; {_begin(summary.bos)}.")
        lines.append(f"{summary.seconds:,.1f} s, peak memory {summary.peak_bytes / 1e9:.2f} GB. Written to {out}")
        lines.append(format_class(summary.format).how_to_load(summary.auto_class, str(out)).line)
        if summary.vllm_unsupported is not None:
            lines.append(f"vLLM does not serve it: {summary.vllm_unsupported}.")
    return table, lines


def _goes(sparsity: float, blocks: str | None) -> str:
    """Return the share that goes, and of what."""
    return f"{sparsity:.2%} of {pruned_part(blocks)} go"


def _where(summary: Summary) -> str:
    """Over which blocks the loss is spread."""
    count = len(summary.widths)
    if not summary.uniform:
        return f"in {count} blocks of their own widths"
    width = max(summary.widths.values(), key=len)
    return (
        f"in {count} blocks of {', '.join(f'{number:,} {axis_kinds()[name].label}' for name, number in width.items())}"
    )


UNMEASURED = ("parameters", "bytes at equal dtype")
"""Figures that are known without a measurement."""
BARS = " ▁▂▃▄▅▆▇█"


def profile(dense: list[Width], now: list[Width]) -> list[str]:
    """Return a line for each kind of module, one character a block: the share of its units that stays."""
    blocks = [shares(after, before) for after, before in zip(now, dense, strict=True)]

    def line(role: str) -> str:
        # The lowest bar means that something is left; a blank, that nothing is.
        marks = "".join(BARS[math.ceil(block.get(role, 1.0) * 8)] for block in blocks)
        return f"{role:<13}|{marks}| block 0 to {len(dense) - 1}, full height: as before"

    return [line(role) for role in dict.fromkeys(role for block in blocks for role in block)]


def plan_table(proposal: Proposal, out: Path | None) -> tuple[Table, list[str]]:
    """A plan block by block, and below it what it amounts to."""
    decided = proposal.plan
    table = Table(title="Plan", title_justify="left")
    axes = [axis_kinds()[name] for name in dict.fromkeys(name for width in proposal.dense for name in width)]
    # Two lines, so that bars fit beside them.
    for name in ("block", *(kind.label.replace(" ", "\n", 1) for kind in axes)):
        table.add_column(name, justify="right")
    table.add_column("stays")
    for index, (dense, width) in enumerate(zip(proposal.dense, proposal.pruned_widths(), strict=True)):
        cells = [f"{width[kind.name]:,}/{dense[kind.name]:,}" if kind.name in dense else "" for kind in axes]
        table.add_row(str(index), *cells, " ".join(_bar(share, 12) for share in shares(width, dense).values()))
    before, after = proposal.parameters
    lines = [
        f"{_goes(decided.sparsity, proposal.blocks)}: {format_count(before)} to {format_count(after)} in the model."
    ]
    if decided.cost is not None:
        lines.append(f"Expected to cost {decided.cost:.3f} nats per token, the modules taken one by one.")
    if decided.note:
        lines.append(f"Note: {decided.note}.")
    if out is not None:
        lines.append(f"Written to {out}; prune with --plan {out}")
    return table, lines


def _bar(share: float, length: int) -> str:
    full = round(share * length)
    return "█" * full + "·" * (length - full)


def survey_table(found: SurveySummary, out: Path) -> tuple[Table, list[str]]:
    """One row for each share that the page offers, and below them where everything is."""
    table = Table(title="What would go", title_justify="left")
    dense = found.dense
    units = totals(dense)
    for name in ("goes", "parameters", *units, "nats per token"):
        table.add_column(name, justify="right")
    for share, decided in found.plans.items():
        now = [decided.widths.get(index, width) for index, width in enumerate(dense)]
        table.add_row(
            f"{decided.sparsity:.1%}",
            format_count(found.parameters[share]),
            *(f"{after:,}/{units[label]:,}" for label, after in totals(now).items()),
            f"{decided.cost or 0.0:.3f}",
        )
    return table, [f"survey.json and survey.html are in {out}", f"Use it: {found.line}"]


def sizes_table(sizes: Sequence[ModelSize], out: Path) -> tuple[Table, list[str]]:
    """One row a size, the dense model first."""
    dense = sizes[0]
    table = Table(title="Sizes", title_justify="left")
    table.add_column("model", overflow="fold")
    for name in ("goes", "parameters", "MB", *(Path(text).stem for text in dense.perplexity)):
        table.add_column(name, justify="right")
    for size in sizes:
        ratios = [f"{value:.2f} ({value / dense.perplexity[text]:.2f}x)" for text, value in size.perplexity.items()]
        table.add_row(
            size.folder, f"{size.sparsity:.1%}", format_count(size.parameters), f"{size.bytes / 1e6:,.1f}", *ratios
        )
    if dense.perplexity:
        return table, [f"sizes.json and sizes.png are in {out}"]
    return table, [f"sizes.json is in {out}; with --perplexity TEXT there is a plot as well"]


def eval_table(result: Evaluation) -> tuple[Table, list[str]]:
    """One model's figures, or two side by side with their ratios, and below them how they were measured."""
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
    for source, text in first.texts.items():
        lines.append(
            f"{short(source)}: {text.tokens:,} tokens scored in {text.rows:,} rows of {text.length}; "
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
    for prompt in first.written:
        lines += [
            "",
            prompt,
            *(f"{name}: {model.written[prompt]}" for name, model in zip(names, result.models, strict=True)),
        ]
    return table, lines


def measured_rows(result: Evaluation) -> list[tuple[str, ...]]:
    """What was measured of a model and the one that it is held against: label, its figure, the other's, their ratio."""
    return [
        (figure.label, *_values(figure), *_ratio(figure))
        for figure in result.figures()
        if figure.label not in UNMEASURED
    ]


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
