"""Table rows of a comparison, and sentences on how they were measured, from the results of its runs."""

from collections.abc import Sequence
from typing import Any

from secateur.measure.figures import short
from secateur.paper.compared_model import ComparedModel
from secateur.paper.comparison import AVERAGE, Column, Comparison, Row
from secateur.paper.recipe import Recipe
from secateur.paper.runs import DENSE, PlannedRun
from secateur.paper.scorer import Scorer
from secateur.retraining.options import NO_TEACHER


def gather_comparison(
    recipe: Recipe,
    models: Sequence[ComparedModel],
    scorer: Scorer,
    planned: Sequence[PlannedRun],
    results: dict[str, dict[str, Any]],
    failed: Sequence[str],
) -> Comparison:
    """Return the comparison as far as its runs are finished.

    Args:
        recipe: The recipe of the comparison.
        models: The models that it compares.
        scorer: The scorer of all runs.
        planned: All runs, finished or not.
        results: Results of the finished runs, by `PlannedRun.key`.
        failed: Error messages of failed runs.
    """
    rows: list[Row] = []
    for model in models:
        published = {} if model.paper is None else model.paper.published
        by_row: dict[str | None, list[PlannedRun]] = {}
        for one in planned:
            if one.model is model:
                by_row.setdefault(None if one.run is None else one.run.row, []).append(one)
        for row, made in by_row.items():
            run, name = made[0].run, DENSE if row is None else row
            axes = {} if run is None else {axis: value for axis, value in run.axes if axis != "seed"}
            found = tuple(results[one.key] for one in made if one.key in results)
            label = DENSE if run is None else run.label
            rows.append(Row(model.name, name, label, axes, found, published.get(name, {})))
        rest = [name for name in published if name not in by_row and name != DENSE]
        rows += [Row(model.name, name, name, {}, (), published[name]) for name in rest]
    texts = list(dict.fromkeys(column for model in models for column in model.texts))
    columns = [Column(name, "perplexity") for name in texts] + [Column(name, "accuracy") for name in scorer.tasks]
    if len(scorer.tasks) > 1:
        columns.append(Column(AVERAGE, "accuracy"))
    protocol = _protocol(recipe, models, scorer)
    return Comparison(recipe.title, protocol, tuple(columns), tuple(rows), len(planned), tuple(failed))


def _protocol(recipe: Recipe, models: Sequence[ComparedModel], scorer: Scorer) -> tuple[str, ...]:
    """Return sentences about how everything was measured."""
    # Files appear by name only: the table is read on other machines.
    shared = ", ".join(f"{key} {short(x) if isinstance(x, str) else x}" for key, x in recipe.options.items())
    lines = [f"Options, unless a row has others: {shared}." if shared else "All runs have the default options."]
    for model in models:
        if model.paper is not None and model.paper.options:
            own = ", ".join(f"{name} {value}" for name, value in model.paper.options.items())
            lines.append(f"{model.name}: {own}.")
        lines += [
            f"Perplexity of {model.name} on {column}: {len(rows):,} rows of {rows.shape[1]} tokens."
            for column, rows in model.texts.items()
        ]
    if scorer.tasks:
        counts = ", ".join(f"{name} {sum(len(t.items) for t in tasks):,}" for name, tasks in scorer.tasks.items())
        lines.append(f"Zero-shot accuracy in %, by length-normalised likelihood where a task has it; items: {counts}.")
    trained = {run.label: run.training for model in models for run, *_ in model.runs if run.training is not None}
    for label, one in trained.items():
        how = f"adapters of rank {one.rank}" if one.rank else "all weights of the blocks"
        learned = "the text" if one.teacher == NO_TEACHER else "the dense model's distributions"
        which = f"{one.token_count:,} tokens of {short(one.calibration)}, in rows of {one.length}"
        lines.append(f"{label}: trained {how} on {which}, to predict {learned}.")
    if seeds := recipe.grid.get("seed"):
        several = f"Mean over the seeds {', '.join(map(str, seeds))}, with the smallest and the largest value."
        lines.append(several if len(seeds) > 1 else f"Seed {seeds[0]}.")
    return tuple(lines)
