"""Table of an evaluation: one model, or two side by side."""

from collections.abc import Sequence

from rich.table import Table

from secateur.measure.answers import ANSWER_TOKENS, LOOP, AnswerScore
from secateur.measure.figures import Evaluation, Figure, ModelScore, short
from secateur.measure.speed import Speed
from secateur.report.summary import bos_note
from secateur.report.tables import make_table

WITH_TEMPLATE = "answers them as a user's message in its chat template"
AS_TEXT = "continues them as text, as it has no chat template"
"""Ends of a sentence about prompts, for a model without a chat template; above, for one with a chat template."""
KNOWN = 2
"""Number of figures, the first ones, that are known without an evaluation: parameters and bytes."""


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
        where = " and ".join(dict.fromkeys(f"{one.dtype} on {one.device}" for one in _speeds(result)))
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


def _speeds(result: Evaluation) -> list[Speed]:
    """Return the speed of each model that was measured."""
    return [model.speed for model in result.models if model.speed is not None]


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
