"""Runs of a recipe, all under one protocol: each model is pruned, scored and deleted.

All models, texts, tasks and runs are checked before the first run starts. Results that runs share are computed once:
token ids of a text, rows that a model generates, surveys, and scores of dense models. The result of a finished run is a
small file whose name is a hash of the run's inputs, so that a restarted comparison computes only what is missing.
"""

import importlib.util
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import secateur
from paper.recipe import NO_TEXT, Recipe, Run, columns_of, expand, short
from paper.store import Store, hash_json, hash_rows
from paper.tables import AVERAGE, Column, Comparison, Row
from secateur import Bars, Options, RunOptions, SecateurError

DENSE = "dense"
"""Name of the row of a model before pruning."""
_SHARED = ("sparsity", "plan", "blocks", "modules", "widths", "ridge", "round")
"""Options that change neither the open model nor its rows; runs that differ only in these share an open model."""


@dataclass(frozen=True)
class Model:
    """Model of a comparison."""

    name: str
    source: str
    """Folder, .gguf file or hub id."""
    entry: str | None
    """Its name in the recipe, if the paper measured this model."""
    rows: dict[Any, Any] = field(default_factory=dict)
    """Calibration rows of earlier runs, by request, for later runs that need the same rows."""
    texts: dict[str, Tensor] = field(default_factory=dict)
    """Token ids to score (rows x length), by column."""


@dataclass(frozen=True)
class PlannedRun:
    """Run of a comparison, or the scoring of a dense model."""

    model: Model
    run: Run | None
    """Run of the recipe; None for the dense model."""
    opened: Any
    """Model that `secateur.open_model` opened with the options of the run."""
    inputs: dict[str, Any]
    """Inputs that decide the result, as JSON values."""

    @cached_property
    def key(self) -> str:
        """Hash of the inputs, which names the result in the store."""
        return hash_json(self.inputs)

    @property
    def row(self) -> str:
        """Name of the row of the table."""
        return DENSE if self.run is None else self.run.row

    @property
    def description(self) -> str:
        """Name of model, row and seed."""
        seed = "" if self.run is None or "seed" not in self.run.axes else f", seed {self.run.axes['seed']}"
        return f"{self.model.name} {self.row}{seed}"


def compare(
    recipe: Recipe,
    sources: Sequence[str],
    out: Path,
    *,
    run_options: RunOptions,
    task_path: Path | None,
    watcher: Bars,
    done: Callable[[Comparison], None],
) -> Comparison:
    """Execute the runs of a recipe of the kind `grid` whose results are not in the folder yet.

    Args:
        recipe: The recipe.
        sources: Folders, .gguf files or hub ids; the recipe's own models if empty.
        out: The folder of the comparison; see `Store`.
        run_options: The device, and whether the checkpoints' own code may run.
        task_path: A folder with the user's own lm-eval task files.
        watcher: Progress output.
        done: Called with the results so far after each run, and once at the end.

    Returns:
        The results of all finished runs. A run that fails is left out and named in `failed`.

    Raises:
        SecateurError: A run, model, text or task is wrong in a way that can be found before the first run.
    """
    store = Store(out)
    store.check()
    limit = recipe.evaluation.limit
    names = columns_of("tasks", recipe.evaluation.tasks)
    secateur.open_tasks([], limit=limit, task_path=task_path)  # checks both arguments, even where there are no tasks
    tasks = {
        column: secateur.open_tasks([task], limit=limit, task_path=task_path, watcher=watcher)
        for column, task in names.items()
    }
    with secateur.cached_token_ids():
        planned = [
            one
            for model in models_of(recipe, sources)
            for one in _plan_runs(recipe, model, tasks, run_options, out, watcher)
        ]
        results = {one.key: found for one in planned if (found := store.find(one.key)) is not None}
        failed: list[str] = []
        if results:
            watcher.note(f"{sum(one.key in results for one in planned)} of {len(planned)} runs are in {out} already")
        with store:
            for number, one in enumerate(planned, start=1):
                if one.key in results:
                    continue
                watcher.note(f"Run {number} of {len(planned)}: {one.description}")
                try:
                    results[one.key] = execute(one, tasks, store, watcher)
                except SecateurError as error:
                    # The other runs may still succeed.
                    failed.append(f"{one.description}: {error}")
                    watcher.note(failed[-1])
                    continue
                store.keep(one.key, one.inputs, results[one.key])
                done(_comparison(recipe, planned, results, failed, tasks))
    comparison = _comparison(recipe, planned, results, failed, tasks)
    done(comparison)
    return comparison


def models_of(recipe: Recipe, sources: Sequence[str]) -> list[Model]:
    """Return the given models, or the recipe's own if none are given."""
    found = []
    for source in sources or [model.id for model in recipe.models.values()]:
        entry = recipe.model_of(source)
        found.append(Model(entry or short(source), source, entry))
    if not found:
        raise SecateurError("the recipe names no model; give one before the recipe")
    names = [model.name for model in found]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise SecateurError(f"model {repeated} is given twice; leave one out, or rename its folder")
    return found


def _plan_runs(
    recipe: Recipe, model: Model, tasks: Mapping[str, Any], run_options: RunOptions, out: Path, watcher: Bars
) -> Iterator[PlannedRun]:
    """Yield all runs on a model, the dense one first; open the model, and check the texts and all runs."""
    # All runs are scored on rows of one length, even where the calibration length is an axis of the grid.
    length = recipe.evaluation.length or recipe.options_of(model.entry).get("length", Options.length)
    columns = columns_of("texts", recipe.evaluation.perplexity)
    if wrong := set(columns.values()) & set(NO_TEXT):
        raise SecateurError(f"{wrong.pop()} is no text that can be scored; name a text file or a data set")
    # Pruned models are written to the disk of the comparison.
    scratch = out.absolute().parent / f".{out.name}.scratch"
    opened: dict[str, Any] = {}
    checked = []
    with watcher.busy(f"Checking all runs on {model.source}"):
        for run in expand(recipe, model.entry):
            try:
                group = hash_json({k: v for k, v in asdict(run.options).items() if k not in _SHARED})
                if group not in opened:
                    first = secateur.open_model(model.source, run.options, run_options, out=scratch)
                    opened[group] = first, secateur.draw_rows(first, dry=True)
                one, rows = opened[group]
                checked.append((run, one.with_options(run.options), rows))
                if run.training and run.training.rank and importlib.util.find_spec("peft") is None:
                    raise SecateurError('LoRA retraining needs peft, which is not installed; pip install "peft>=0.18"')
            except SecateurError as error:
                raise SecateurError(f"{model.name}, {run.row or 'run'}: {error}") from error
    first = checked[0][1]
    checkpoint = first.stream.checkpoint
    for column, text in columns.items():
        with watcher.busy(f"Reading {text}"):
            model.texts[column] = secateur.consecutive_rows(
                checkpoint.tokenizer(),
                text,
                length=length,
                tokens=recipe.evaluation.tokens,
                vocab_size=checkpoint.config.vocab_size,
                max_positions=checkpoint.max_positions,
            ).ids
    dense = {
        "secateur": secateur.__version__,
        **checkpoint.identity,
        "device": first.stream.device.type,
        "texts": {column: hash_rows(ids) for column, ids in model.texts.items()},
        "tasks": {name: hash_json(repr([(one.name, one.items) for one in some])) for name, some in tasks.items()},
    }
    yield PlannedRun(model, None, first, dense)
    for run, one, rows in checked:
        own = {
            "options": asdict(run.options),
            # Random ids that stand in for generated rows decide these together with the options.
            "rows": [hash_rows(group) for group in (rows.selection, *rows.grouped.groups)],
            # Contents of a file with a plan or with shares.
            "given": repr(one.request.plan_from_file),
            "training": run.training and asdict(run.training),
        }
        yield PlannedRun(model, run, replace(one, stream=one.stream.using(watcher=watcher)), dense | own)


def execute(one: PlannedRun, tasks: Mapping[str, Any], store: Store, watcher: Bars) -> dict[str, Any]:
    """Prune, score and delete the model; return scores and sizes as JSON values."""
    start, opened = time.perf_counter(), one.opened
    checkpoint, device = opened.stream.checkpoint, opened.stream.device
    sparsity, parameters = 0.0, round(opened.request.problem.parameters.dense)
    widths = [block.width for block in opened.stream.blocks]
    scored = checkpoint
    if one.run is not None:
        folder = store.scratch / "model"
        summary = prune(opened, one.model, folder, store)
        sparsity, parameters, widths = summary.sparsity, summary.parameters[1], summary.pruned_widths()
        if one.run.training is not None:
            pruned, folder = folder, store.scratch / "retrained"
            where = "cpu" if device.type == "cpu" else "auto"
            training = replace(one.run.training, teacher=one.run.training.teacher or str(checkpoint.path))
            secateur.retrain(pruned, folder, training, device=where, overwrite=True, watcher=watcher)
        scored = secateur.open_checkpoint(folder, trust_remote_code=checkpoint.trust_remote_code)
    with watcher.busy(f"Loading {one.description}"):
        network = secateur.load(scored, torch.float32, device)
    perplexities, accuracies = {}, {}
    for column, ids in one.model.texts.items():
        what = f"{one.description} on {column}"
        perplexities[column] = secateur.perplexity(network, ids, watcher=watcher, what=what).perplexity
    for column, some in tasks.items():
        found = secateur.zero_shot(network, opened.tokenizer, some, watcher=watcher, what=f"{one.description} on")
        accuracies[column] = 100 * sum((result.acc_norm or result.acc).value for result in found) / len(found)
    for name in ("model", "retrained"):
        shutil.rmtree(store.scratch / name, ignore_errors=True)
    return {
        "perplexity": perplexities,
        "accuracy": accuracies,
        "sparsity": sparsity,
        "parameters": parameters,
        "heads": sum(width.get("kv_groups", 1) * width.get("heads_per_group", 0) for width in widths),
        "channels": sum(width.get("channels", 0) + width.get("experts", 0) for width in widths),
        "seconds": time.perf_counter() - start,
    }


def prune(run: Any, model: Model, folder: Path, store: Store) -> Any:
    """Execute the steps of `secateur.prune` after opening; rows are drawn once, and surveys are kept in the store."""
    run = replace(run, started=time.perf_counter())
    if (rows := model.rows.get(run.row_request)) is None:
        rows = model.rows[run.row_request] = secateur.draw_rows(run)
    surveyed = run.options.survey_key | {name: getattr(run.options, name) for name in ("blocks", "modules")}
    survey = store.survey_file({**run.stream.checkpoint.identity, **surveyed, "rows": hash_rows(rows.selection)})
    run = replace(run, run_options=replace(run.run_options, survey=survey, overwrite=True))
    plan = secateur.plan_widths(run, rows, secateur.survey_model(run, rows))
    return secateur.write_model(run, rows, plan, secateur.fit_blocks(run, rows, plan), folder)


def _comparison(
    recipe: Recipe,
    planned: Sequence[PlannedRun],
    results: Mapping[str, dict[str, Any]],
    failed: Sequence[str],
    tasks: Mapping[str, Any],
) -> Comparison:
    """Return the comparison as far as its runs are finished: a row for all seeds of a run, and for published figures.

    Args:
        recipe: The recipe of the comparison.
        planned: All runs, finished or not.
        results: Results of the finished runs, by key.
        failed: Error messages of failed runs.
        tasks: Open tasks by column.
    """
    rows: dict[tuple[str, str], Row] = {}
    models = {one.model.name: one.model for one in planned}
    for name, model in models.items():
        published = recipe.models[model.entry].published if model.entry else {}
        for one in planned:
            if one.model is model:
                axes = {} if one.run is None else {k: v for k, v in one.run.axes.items() if k != "seed"}
                label = DENSE if one.run is None else one.run.label
                empty = Row(name, one.row, label, axes, [], published.get(one.row, {}))
                found = rows.setdefault((name, one.row), empty)
                found.results.extend([results[one.key]] if one.key in results else [])
        for label, figures in published.items():
            if label != DENSE:
                rows.setdefault((name, label), Row(name, label, label, {}, [], figures))
    texts = dict.fromkeys(column for model in models.values() for column in model.texts)
    columns = [Column(name, "perplexity") for name in texts] + [Column(name, "accuracy") for name in tasks]
    if len(tasks) > 1:
        columns.append(Column(AVERAGE, "accuracy"))
    notes = _protocol(recipe, planned, tasks)
    return Comparison(recipe.title, notes, columns, list(rows.values()), len(planned), list(failed))


def _protocol(recipe: Recipe, planned: Sequence[PlannedRun], tasks: Mapping[str, Any]) -> list[str]:
    """Return sentences about how everything was measured."""
    # Files appear by name only: the table is read on other machines.
    shared = ", ".join(f"{key} {short(x) if isinstance(x, str) else x}" for key, x in recipe.options.items())
    lines = [f"Options, unless a row has others: {shared}." if shared else "All runs have the default options."]
    for model in {one.model.name: one.model for one in planned}.values():
        if model.entry and (options := recipe.models[model.entry].options):
            lines.append(f"{model.name}: {', '.join(f'{name} {value}' for name, value in options.items())}.")
        lines += [
            f"Perplexity of {model.name} on {column}: {len(ids):,} rows of {ids.shape[1]} tokens."
            for column, ids in model.texts.items()
        ]
    if tasks:
        counts = ", ".join(f"{name} {sum(len(task.items) for task in some):,}" for name, some in tasks.items())
        lines.append(f"Zero-shot accuracy in %, by length-normalised likelihood where a task has it; items: {counts}.")
    for label, one in {one.run.label: one.run.training for one in planned if one.run and one.run.training}.items():
        how = f"adapters of rank {one.rank}" if one.rank else "all weights of the blocks"
        learned = "the text" if one.teacher == "none" else "the dense model's distributions"
        which = f"{one.token_count:,} tokens of {short(one.calibration)}, in rows of {one.length}"
        lines.append(f"{label}: trained {how} on {which}, to predict {learned}.")
    if seeds := recipe.grid.get("seed"):
        several = f"Mean over the seeds {', '.join(map(str, seeds))}, with the smallest and the largest value."
        lines.append(several if len(seeds) > 1 else f"Seed {seeds[0]}.")
    return lines
