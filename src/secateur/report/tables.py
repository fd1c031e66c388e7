"""Tables of the commands for the terminal, each with lines to print below it."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from textwrap import fill

from rich.table import Table

from secateur.base.words import format_count
from secateur.formats.format import format_class
from secateur.measure.answers import ANSWER_TOKENS, LOOP, AnswerScore
from secateur.measure.figures import Evaluation, Figure, ModelScore, short
from secateur.model.axes import Width, axis_kinds, shares, totals
from secateur.report.summary import (
    ModelSize,
    Proposal,
    Summary,
    SurveySummary,
    Trimmed,
    before_and_after,
    bos_note,
    each_keeps,
    estimated_loss,
    pruned_part,
)

BARS = " ▁▂▃▄▅▆▇█"
BEFORE_AFTER = ("", "before", "after", "ratio")
WITH_TEMPLATE = "answers them as a user's message in its chat template"
AS_TEXT = "continues them as text, as it has no chat template"
"""Ends of a sentence about prompts, for a model without a chat template; above, for one with a chat template."""
KNOWN = 2
"""Number of figures, the first ones, that are known without an evaluation: parameters and bytes."""
LONG_WORD = 20
"""Number of characters from which on a word of a table, such as a path, may be broken."""


def make_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    texts: Collection[int] = (0,),
    lines: bool = False,
) -> Table:
    """Return a table whose figures and short words are never broken, whatever the width of the terminal.

    Args:
        title: Title above the table.
        columns: Headings.
        rows: Cells of each row.
        texts: Places of the columns that hold text; the others hold figures.
        lines: Whether a line is drawn between two rows.
    """
    rows = list(rows)
    table = Table(title=title, title_justify="left", show_lines=lines)
    for number, name in enumerate(columns):
        cells = [row[number] for row in rows]
        words = cells if number not in texts else [word[:LONG_WORD] for cell in cells for word in cell.split()]
        table.add_column(
            name,
            justify="left" if number in texts else "right",
            overflow="fold",
            min_width=max(map(len, words), default=0),
        )
    for row in rows:
        table.add_row(*row)
    return table


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.2f} MB"


def prune_table(summary: Summary, out: Path) -> tuple[Table, list[str]]:
    """Return a table of sizes before and after pruning, and lines about the run."""
    dense, pruned = list(summary.dense), summary.pruned_widths()
    left = totals(pruned)
    figures: list[tuple[str, tuple[int, int], Callable[[int], str]]] = [
        ("parameters", summary.parameters, format_count),
        ("weights, stored alike", summary.bytes, _megabytes),
        ("KV cache per token", summary.cache_bytes, "{:,} B".format),
        *([] if summary.vocabulary is None else [("vocabulary", summary.vocabulary, "{:,}".format)]),
        *((label, (before, left[label]), "{:,}".format) for label, before in totals(dense).items()),
    ]
    title = "Expected" if summary.is_dry_run else "Pruned"
    table = make_table(title, BEFORE_AFTER, [before_and_after(*figure) for figure in figures])
    lines = [f"{_removed(summary.sparsity, summary.blocks)}; {_widths(summary)}."]
    lines += [] if summary.uniform else profile(dense, pruned)
    lines += [f"Note: {summary.note}."] if summary.note else []
    return table, lines + (_expectation(summary, out) if summary.is_dry_run else _result(summary, out))


def trim_table(done: Trimmed, out: Path) -> tuple[Table, list[str]]:
    """Return a table of sizes before and after tokens were cut, and lines about the new folder."""
    rows = [
        before_and_after("vocabulary", done.tokens, "{:,}".format),
        before_and_after("parameters", done.parameters, format_count),
        before_and_after("weights on disk", done.bytes, _megabytes),
    ]
    if done.bits_per_byte is not None:
        rows.append(before_and_after("bits per byte", done.bits_per_byte, "{:.4f}".format))
    return make_table("Trimmed", BEFORE_AFTER, rows), [f"Written to {out}", done.loading]


def _expectation(summary: Summary, out: Path) -> list[str]:
    """Return lines about the time and memory that a dry run expects."""
    peak = f"{summary.peak_bytes / 1e9:.2f} GB of memory, not counting the libraries"
    lines = [f"Expected: {summary.seconds:,.0f} s and {peak}."]
    if len(summary.effort_seconds) > 1:
        efforts = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in summary.effort_seconds.items())
        lines.append(f"With --effort: {efforts}.")
    return [*lines, f"Nothing was written to {out} (dry run)."]


def _result(summary: Summary, out: Path) -> list[str]:
    """Return lines about a finished run: its calibration, time and memory, and how to load the output."""
    lines = [
        f"Calibrated on {summary.tokens:,} tokens; {bos_note(summary.begins_with_bos)}.",
        f"{summary.seconds:,.1f} s, peak memory {summary.peak_bytes / 1e9:.2f} GB. Written to {out}",
        format_class(summary.format).how_to_load(summary.auto_class, str(out)).line,
    ]
    return lines + ([f"vLLM cannot serve it: {summary.vllm_unsupported}."] if summary.vllm_unsupported else [])


def _removed(sparsity: float, blocks: str | None) -> str:
    """Return a clause about the share of the parameters that is removed."""
    return f"{sparsity:.2%} of {pruned_part(blocks)} are removed"


def _widths(summary: Summary) -> str:
    """Return a clause about the widths of the pruned blocks."""
    if not summary.uniform:
        return f"the widths of the {len(summary.widths)} blocks differ"
    where, width = each_keeps(summary.widths, len(summary.dense))
    numbers = ", ".join(f"{number:,} {axis_kinds()[name].label}" for name, number in width.items())
    return f"{where} keeps: {numbers}"


def profile(dense: list[Width], pruned: list[Width]) -> list[str]:
    """Return a line for each role of modules, with a bar for each block: the share of its units that is kept."""
    blocks = [shares(after, before) for after, before in zip(pruned, dense, strict=True)]

    def line(role: str) -> str:
        # Rounded up: the lowest bar means that some units are kept, a blank that none are.
        marks = "".join(BARS[math.ceil(block.get(role, 1.0) * 8)] for block in blocks)
        return f"{role:<13}|{marks}| share of units kept in blocks 0 to {len(dense) - 1}; a full bar means all"

    return [line(role) for role in dict.fromkeys(role for block in blocks for role in block)]


def plan_table(proposal: Proposal, out: Path | None) -> tuple[Table, list[str]]:
    """Return a table of a plan, one row for each block, and lines about the whole plan."""
    plan = proposal.plan
    axes = [axis_kinds()[name] for name in dict.fromkeys(name for width in proposal.dense for name in width)]
    kept = f"kept:\n{', '.join(dict.fromkeys(kind.role for kind in axes))}"
    # Names of axes take two lines, so that bars fit next to them.
    columns = ["block", *(fill(kind.label, 14) for kind in axes), kept]
    rows = []
    for index, (dense, width) in enumerate(zip(proposal.dense, proposal.pruned_widths(), strict=True)):
        cells = [f"{width[kind.name]:,}/{dense[kind.name]:,}" if kind.name in dense else "" for kind in axes]
        rows.append((str(index), *cells, " ".join(_bar(share, 12) for share in shares(width, dense).values())))
    before, after = map(format_count, proposal.parameters)
    lines = [f"{_removed(plan.sparsity, proposal.blocks)}; the whole model has {after} of {before} parameters."]
    if plan.cost is not None:
        lines.append(estimated_loss(plan.cost))
    lines += [f"Note: {plan.note}."] if plan.note else []
    lines += [] if out is None else [f"Written to {out}; prune with --plan {out}"]
    return make_table("Plan", columns, rows, texts=[len(axes) + 1]), lines


def _bar(share: float, length: int) -> str:
    full = round(share * length)
    return "█" * full + "·" * (length - full)


def survey_table(result: SurveySummary, out: Path) -> tuple[Table, list[str]]:
    """Return a table of plans, one row for each sparsity, and lines about the files of the survey."""
    units = totals(result.dense)
    rows = []
    for share, plan in result.plans.items():
        widths = [plan.widths.get(index, width) for index, width in enumerate(result.dense)]
        kept = [f"{after:,}/{units[label]:,}" for label, after in totals(widths).items()]
        rows.append((f"{plan.sparsity:.1%}", format_count(result.parameters[share]), *kept, f"{plan.cost or 0.0:.3f}"))
    columns = ("sparsity", "parameters", *units, "estimated loss increase (nats per token)")
    # A small model may have one plan for several sparsities.
    table = make_table("Plans by sparsity", columns, dict.fromkeys(rows), texts=())
    page = out / "survey.html"
    return table, [
        f"Open {page} in a browser to choose a size; it needs no network. The survey itself is {out / 'survey.json'}",
        f"Prune from this survey: {result.line}",
    ]


def sizes_table(sizes: Sequence[ModelSize], out: Path, length: int) -> tuple[Table, list[str]]:
    """Return a table of models, the dense one first, and lines about their perplexities and the files.

    Args:
        sizes: The models.
        out: Folder of the models.
        length: Tokens in each row that was scored.
    """
    dense = sizes[0]
    rows = []
    for size in sizes:
        ratios = [f"{value:.2f} ({value / dense.perplexity[text]:.2f}x)" for text, value in size.perplexity.items()]
        figures = (f"{size.sparsity:.1%}", format_count(size.parameters), f"{size.bytes / 1e6:,.1f}")
        rows.append((size.folder, *figures, *ratios))
    columns = ("model", "sparsity", "parameters", "MB", *(Path(text).name for text in dense.perplexity))
    files = "sizes.json and sizes.png are" if dense.perplexity else "sizes.json is"
    advice = "" if dense.perplexity else "; with --perplexity TEXT there is a plot as well"
    scored = [f"Perplexity: of rows of {length} tokens, each scored on its own."] if dense.perplexity else []
    return make_table("Sizes", columns, rows), [*scored, f"{files} in {out}{advice}"]


def eval_table(result: Evaluation) -> tuple[Table, list[str]]:
    """Return the table of an evaluation, and lines about the measurements to print below it."""
    names = _names(result)
    table = make_table("Evaluation", ["", *names, "ratio"][: 4 if len(names) == 2 else 2], _rows(result))
    lines = measurement_notes(result, names)
    for prompt in result.models[0].written:
        texts = (f"{name}: {model.written[prompt]}" for name, model in zip(names, result.models, strict=True))
        lines += ["", prompt, *texts]
    return table, lines


def _names(result: Evaluation) -> list[str]:
    """Return the short name of each model; their whole names if the short ones are the same."""
    names = [short(model.name) for model in result.models]
    return names if len(set(names)) == len(names) else [model.name for model in result.models]


def measurement_notes(result: Evaluation, names: Sequence[str]) -> list[str]:
    """Return lines about how texts, answers, tasks and speed were measured, for one model or two, and their names."""
    model, compared = result.models[0], len(result.models) == 2
    lines = [_text(result, source) for source in model.texts]
    if model.answers is not None:
        lines.append(_answers(model.answers, names))
    if model.written:
        lines.append(_prompts(result.models, names))
    if model.tasks:
        items = ", ".join(f"{task.name} {task.items:,} items" for task in model.tasks)
        ratios = "; ratios with a 95 % interval, paired by item" * compared
        lines.append(f"Zero-shot: {items}; ± one standard error{ratios}.")
    if (speed := model.speed) is not None:
        speeds = [one.speed for one in result.models if one.speed is not None]
        where = " and ".join(dict.fromkeys(f"{one.dtype} on {one.device}" for one in speeds))
        runs = f"medians over {len(speed.prefill_seconds)} runs"
        runs += "; the models ran in turns, and a ratio is a median over pairs of runs" * compared
        lines.append(
            f"Speed: a prompt of {speed.prompt} tokens, then {speed.new} new tokens, {where}, "
            f"{speed.threads} CPU thread{'s' * (speed.threads > 1)}; {runs}."
        )
    return lines


def _text(result: Evaluation, source: str) -> str:
    """Return a line about the rows of a text, which differ between models with different tokenizers."""
    texts = [model.texts[source] for model in result.models]
    scored = " and ".join(dict.fromkeys(f"{one.tokens:,} tokens ({one.bytes or 0:,} bytes)" for one in texts))
    return (
        f"{result.name_of(source)}: {scored} scored in {texts[0].rows:,} rows of {texts[0].length}; "
        f"{' and '.join(dict.fromkeys(bos_note(model.begins_with_bos) for model in result.models))}."
    )


def _prompts(models: Sequence[ModelScore], names: Sequence[str]) -> str:
    """Return a line about what each model gets for a prompt."""
    by_template = {model.chat_template: name for model, name in zip(models, names, strict=True)}
    who = by_template if len(by_template) == len(models) else {models[0].chat_template: "each model"}
    clauses = (f"{name} {WITH_TEMPLATE if template else AS_TEXT}" for template, name in who.items())
    return f"Prompts: {'; '.join(clauses)}."


def _answers(score: AnswerScore, names: Sequence[str]) -> str:
    """Return a line about how answers were measured."""
    line = f"Answers: {score.prompts} prompts, up to {ANSWER_TOKENS} tokens each, always the likeliest token. "
    if score.agreement is not None:
        line += f"Agreement: share of the answer tokens of {names[1]} that {names[0]} ranks first. "
    return line + f"An answer loops if a run of {LOOP} tokens occurs twice in it."


def measured_rows(result: Evaluation) -> list[tuple[str, ...]]:
    """Return the figures of two compared models that only an evaluation gives: label, both values, ratio."""
    return _rows(result)[KNOWN:]


def _rows(result: Evaluation) -> list[tuple[str, ...]]:
    """Return a row of each figure: its label, the value of each model, and the ratio of two models."""
    return [(figure.label, *_values(figure), *_ratio(figure)) for figure in result.figures()]


def _values(figure: Figure) -> list[str]:
    """Return the value of each model as text, with its standard error where that is known."""
    values = [figure.form.format(value) for value in figure.values]
    errors = ["" if error is None else f" ± {figure.form.format(error)}" for error in figure.errors]
    return [value + error for value, error in zip(values, errors, strict=True)] if errors else values


def _ratio(figure: Figure) -> list[str]:
    """Return the ratio of two models as text, accuracies in percent with an interval; empty for one model."""
    if len(figure.values) < 2:
        return []
    if figure.ratio is None:
        return [""]
    if not figure.errors:
        return [f"{figure.ratio:.3f}"]
    if figure.interval is None:
        return [f"{figure.ratio:.1%}"]
    low, high = figure.interval
    return [f"{figure.ratio:.1%} ({100 * low:.1f} to {100 * high:.1f})"]
