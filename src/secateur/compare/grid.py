"""`secateur compare`: every run of a recipe under one protocol, each pruned as `prune` does, scored and thrown away.

All models, texts, tasks and runs are checked before the first is carried out. What runs have in common is made once:
token ids of a text, rows that a model writes, the survey that several widths and recoveries start from, the dense
scores. A finished run is a small file under a name that what decides it gives, so that a restart does only what is
missing.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import secateur
from secateur.base.device import pick_device
from secateur.base.errors import SecateurError
from secateur.base.files import digest, hash_of
from secateur.base.progress import Silent, Watcher, reading
from secateur.base.words import twice
from secateur.commands.open import OpenRun, open_model
from secateur.commands.options import Options, Running
from secateur.commands.request import check_request
from secateur.commands.steps import draw_rows, fit_blocks, plan_widths, survey_model, write_model
from secateur.commands.survey_file import survey_key
from secateur.compare.comparison import AVERAGE, Column, Comparison, Row
from secateur.compare.recipe import PaperModel, Recipe, Run, expand, named
from secateur.compare.run_store import RunStore
from secateur.measure.compare import load, scored_rows, short
from secateur.measure.perplexity import perplexity
from secateur.measure.tasks import OpenTask, open_tasks, zero_shot
from secateur.model.checkpoint import Checkpoint, open_checkpoint
from secateur.plan.meters import parameter_meter
from secateur.report.summary import Summary
from secateur.retraining.retrain import check_retraining, retrain, training_rows
from secateur.text.calibration import check_calibration, tokenised_once
from secateur.text.draw import CalibrationRows, RowRequest
from secateur.text.sources import RANDOM, SELF
from secateur.write.write import model_output

DENSE = "dense"
"""The row of a model before pruning."""

_REQUESTED = frozenset(("sparsity", "plan", "blocks", "modules", "widths", "ridge", "round"))
"""Options that decide neither the open model nor its rows; runs that differ in no others share what was opened."""


class Asked(NamedTuple):
    """One model of the comparison, and what to make of it."""

    name: str
    source: str
    paper: PaperModel | None
    runs: list[Run]


@dataclass(frozen=True)
class Subject:
    """One model of the comparison, opened and checked."""

    name: str
    paper: PaperModel | None
    checkpoint: Checkpoint
    tokenizer: Any
    texts: dict[str, Tensor]
    """Rows to score (rows x length), by column."""
    runs: list[tuple[Run, OpenRun, CalibrationRows]]
    """Rows of runs whose model writes its own are stand-ins, and no fit's copies are there."""
    drawn: dict[RowRequest, CalibrationRows] = field(default_factory=dict)
    """The rows that runs were made with, for others that want the very same."""


@dataclass(frozen=True)
class Judge:
    """Scores whole models, all in the same way."""

    tasks: dict[str, list[OpenTask]]
    """By column; a group of tasks is averaged."""
    device: torch.device
    watcher: Watcher

    def score(self, folder: str | Path, subject: Subject, what: str) -> dict[str, Any]:
        """Perplexities and accuracies in percent, by column."""
        checkpoint = subject.checkpoint
        if folder != checkpoint.path:
            checkpoint = open_checkpoint(folder, trust_remote_code=checkpoint.trust_remote_code)
        with self.watcher.busy(f"Loading {what}"):
            network = load(checkpoint, torch.float32, self.device)
        texts, accuracies = {}, {}
        for column, rows in subject.texts.items():
            texts[column] = perplexity(network, rows, watcher=self.watcher, what=f"{what} on {column}").perplexity
        for column, tasks in self.tasks.items():
            found = zero_shot(network, subject.tokenizer, tasks, watcher=self.watcher, what=f"{what} on")
            accuracies[column] = 100 * sum((one.acc_norm or one.acc).value for one in found) / len(found)
        return {"perplexity": texts, "accuracy": accuracies}

    def decided_by(self, subject: Subject) -> dict[str, Any]:
        """What decides the scores of a given model."""
        asked = {name: repr([(task.name, task.items) for task in tasks]) for name, tasks in self.tasks.items()}
        return {
            "secateur": secateur.__version__,
            "fingerprint": subject.checkpoint.fingerprint,
            "device": self.device.type,
            "texts": {column: hash_of(rows) for column, rows in subject.texts.items()},
            "tasks": {name: hashlib.sha256(items.encode()).hexdigest()[:16] for name, items in asked.items()},
        }


@dataclass(frozen=True)
class Planned:
    """One run of the comparison, or the scoring of a dense model."""

    subject: Subject
    run: Run | None
    """None for the dense model."""
    open: OpenRun
    decided_by: dict[str, Any]

    @cached_property
    def key(self) -> str:
        """The name of its result."""
        return digest(self.decided_by)

    @property
    def what(self) -> str:
        """In words."""
        if self.run is None:
            return f"{self.subject.name} {DENSE}"
        seed = self.run.place("seed")
        return f"{self.subject.name} {self.run.row}" + ("" if seed is None else f", seed {seed}")

    def carried_out(self, judge: Judge, store: RunStore) -> dict[str, Any]:
        """Scores and sizes; what is pruned is thrown away."""
        start = time.perf_counter()
        folder, sparsity = self.subject.checkpoint.path, 0.0
        parameters = round(parameter_meter(self.open.stream).dense)
        widths = [block.width for block in self.open.stream.blocks]
        if self.run is not None:
            folder = store.scratch / "model"
            summary = prune_run(self.open, self.subject, folder, store)
            sparsity, parameters, widths = summary.sparsity, summary.parameters[1], summary.now()
            if self.run.training is not None:
                pruned, folder = folder, store.scratch / "retrained"
                device = "cpu" if judge.device.type == "cpu" else "auto"
                retrain(pruned, folder, self.run.training, device=device, overwrite=True, watcher=judge.watcher)
        scores = judge.score(folder, self.subject, self.what)
        for name in ("model", "retrained"):
            shutil.rmtree(store.scratch / name, ignore_errors=True)
        return scores | {
            "sparsity": sparsity,
            "parameters": parameters,
            "heads": sum(width.heads for width in widths),
            "channels": sum(width.fed for width in widths),
            "seconds": time.perf_counter() - start,
        }


def prune_run(run: OpenRun, subject: Subject, folder: Path, store: RunStore) -> Summary:
    """All steps of `prune` but the first; rows are drawn once, and the survey is kept in the comparison's folder."""
    run = replace(run, started=time.perf_counter())
    if (rows := subject.drawn.get(run.row_request)) is None:
        rows = subject.drawn[run.row_request] = draw_rows(run)
    running = replace(run.running, survey=store.survey_file(survey_key(run, rows.text)), overwrite=True)
    run = replace(run, running=running)
    plan = plan_widths(run, rows, survey_model(run, rows))
    return write_model(run, rows, plan, fit_blocks(run, rows, plan), folder)


def compare(
    recipe: Recipe,
    models: Sequence[str],
    out: Path,
    *,
    task_path: Path | None,
    done: Callable[[Comparison], None],
    watcher: Watcher,
    **where: Any,
) -> Comparison:
    """Carry out a recipe of the kind `grid`.

    Args:
        models: folders, .gguf files or hub ids; the recipe's own where there are none.
        out: the folder that keeps finished runs; see `RunStore`.
        task_path: a folder with lm-eval task files of one's own.
        done: called with what there is after each run, and where nothing was left to do.
        where: fields of `Running`: the device, and whether the checkpoints' own code may run.

    Returns:
        All that is finished. A run that turns out impossible is left out, and named in `failed`.

    Raises:
        SecateurError: for anything wrong with a run, a model, a text or a task that can be seen before the first run.
    """
    running = Running(**where)
    device, store = pick_device(running.device), RunStore(out)
    store.check()
    judge = Judge(_tasks(recipe, task_path, watcher), device, watcher)
    with tokenised_once():
        subjects = [open_subject(recipe, asked, running, watcher) for asked in sources(recipe, models)]
        for subject in subjects:
            first = subject.runs[0][1]
            # On the disk that the comparison will be on.
            beside = out.absolute().parent / f".{out.name}.scratch"
            model_output(first.stream, beside, None, overwrite=True, dtype=first.dtype).check()
        with store:
            return _carry_out(recipe, subjects, judge, store, done)


def _carry_out(
    recipe: Recipe, subjects: Sequence[Subject], judge: Judge, store: RunStore, done: Callable[[Comparison], None]
) -> Comparison:
    """All runs that are not in the store yet, one after the other."""
    watcher, planned = judge.watcher, [one for subject in subjects for one in _planned(subject, judge)]
    results = {one.key: found for one in planned if (found := store.find(one.key)) is not None}
    failed: list[str] = []
    if results:
        watcher.note(f"{sum(one.key in results for one in planned)} of {len(planned)} runs are in {store.path} already")
    for number, one in enumerate(planned, start=1):
        if one.key in results:
            continue
        watcher.note(f"Run {number} of {len(planned)}: {one.what}")
        try:
            results[one.key] = one.carried_out(judge, store)
        except SecateurError as error:
            # Found by running alone; it says nothing about the other runs.
            failed.append(f"{one.what}: {error}")
            watcher.note(failed[-1])
            continue
        store.keep(one.key, one.decided_by, results[one.key])
        done(_comparison(recipe, subjects, judge, planned, results, failed))
    whole = _comparison(recipe, subjects, judge, planned, results, failed)
    done(whole)
    return whole


def sources(recipe: Recipe, models: Sequence[str]) -> list[Asked]:
    """Every model with its runs: those given, or the recipe's own."""
    found = []
    for source in models or [model.id for model in recipe.models.values()]:
        entry, paper = recipe.model_of(source) or (None, None)
        found.append(Asked(short(source) if entry is None else entry, source, paper, expand(recipe, entry)))
    if not found:
        raise SecateurError("the recipe names no model of its own; give one in front of it")
    if (again := twice([asked.name for asked in found])) is not None:
        raise SecateurError(f"model {again} is there twice; leave one out, or give its folder another name")
    return found


def open_subject(recipe: Recipe, asked: Asked, running: Running, watcher: Watcher) -> Subject:
    """Open a model with all runs on it, and find what is wrong with any."""
    columns = _columns("texts", [named(text, short(text)) for text in recipe.evaluation.perplexity])
    # One length for all runs, also where the calibration's is an axis of the grid.
    shared = recipe.options | (asked.paper.options if asked.paper else {})
    length = recipe.evaluation.length or shared.get("length", Options.length)
    for text in columns.values():
        if text in (RANDOM, SELF):
            ids = "random ids" if text == RANDOM else "what a model writes itself"
            raise SecateurError(f"{ids} cannot be scored; name a text file or a data set")
        check_calibration(text, length=length)
    for run in asked.runs:
        for source in run.options.sources:
            check_calibration(source, samples=run.options.samples, length=run.options.length)
        if run.training is not None:
            check_retraining(running.device)
    opened: dict[str, tuple[OpenRun, CalibrationRows]] = {}
    found = []
    with reading(watcher, "Checking all runs on", asked.source):
        for run in asked.runs:
            group = digest({k: v for k, v in asdict(run.options).items() if k not in _REQUESTED})
            try:
                if group not in opened:
                    first = open_model(asked.source, run.options, running)
                    opened[group] = first, draw_rows(first, dry=True)
                model, rows = opened[group]
                request = check_request(model.stream, run.options, model.dtype, Silent())
                if run.training is not None:
                    training_rows(model.stream.checkpoint, run.training, Silent())
            except SecateurError as error:
                raise SecateurError(f"{asked.name}, {run.row or 'run'}: {error}") from error
            found.append((run, replace(model, options=run.options, request=request), rows))
    checkpoint = found[0][1].stream.checkpoint
    tokenizer, texts = checkpoint.tokenizer(), {}
    for column, text in columns.items():
        with reading(watcher, "Reading", text):
            texts[column] = scored_rows(checkpoint, tokenizer, text, length, recipe.evaluation.tokens)
    return Subject(asked.name, asked.paper, checkpoint, tokenizer, texts, found)


def _columns(what: str, sources: Sequence[tuple[str, str]]) -> dict[str, str]:
    """What is scored, by the name of its column."""
    names = [name for name, _ in sources]
    if (again := twice(names)) is not None:
        raise SecateurError(f"two {what} are called {again}; give them names of their own, NAME={what[:-1].upper()}")
    return dict(sources)


def _tasks(recipe: Recipe, task_path: Path | None, watcher: Watcher) -> dict[str, list[OpenTask]]:
    """The tasks of each column, with their items."""
    limit = recipe.evaluation.limit
    open_tasks([], limit=limit, task_path=task_path)  # what is wrong with these, also where there are no tasks
    wanted = _columns("tasks", [named(task, task) for task in recipe.evaluation.tasks])
    return {
        column: open_tasks([task], limit=limit, task_path=task_path, watcher=watcher) for column, task in wanted.items()
    }


def _planned(subject: Subject, judge: Judge) -> Iterator[Planned]:
    """All runs on a model, the dense one first, with what decides each: the dense weights and scoring, and its own."""
    dense = judge.decided_by(subject)
    yield Planned(subject, None, subject.runs[0][1], dense)
    for run, opened, rows in subject.runs:
        training = run.training
        trained = None if training is None else training_rows(subject.checkpoint, training, Silent())
        own = {
            "options": asdict(opened.options),
            # With the options, stand-ins decide what a model writes in their place.
            "rows": [hash_of(group) for group in (rows.text, *rows.groups.groups)],
            # The contents of a file with a plan or ratios.
            "given": repr(opened.request.plan_from_file),
            "training": training and asdict(training),
            "training rows": None if trained is None else hash_of(trained),
        }
        yield Planned(subject, run, replace(opened, watcher=judge.watcher), dense | own)


def _comparison(
    recipe: Recipe,
    subjects: Sequence[Subject],
    judge: Judge,
    planned: Sequence[Planned],
    results: dict[str, dict[str, Any]],
    failed: Sequence[str],
) -> Comparison:
    """Rows from the results that there are, by key."""
    rows: list[Row] = []
    for subject in subjects:
        published = {} if subject.paper is None else subject.paper.published
        by_row: dict[str | None, list[Planned]] = {}
        for one in planned:
            if one.subject is subject:
                by_row.setdefault(None if one.run is None else one.run.row, []).append(one)
        for row, made in by_row.items():
            run, name = made[0].run, DENSE if row is None else row
            axes = {} if run is None else {axis: value for axis, value in run.axes if axis != "seed"}
            found = tuple(results[one.key] for one in made if one.key in results)
            label = DENSE if run is None else run.label
            rows.append(Row(subject.name, name, label, axes, found, published.get(name, {})))
        rest = [name for name in published if name not in by_row and name != DENSE]
        rows += [Row(subject.name, name, name, {}, (), published[name]) for name in rest]
    texts = list(dict.fromkeys(column for subject in subjects for column in subject.texts))
    columns = [Column(name, "perplexity") for name in texts] + [Column(name, "accuracy") for name in judge.tasks]
    if len(judge.tasks) > 1:
        columns.append(Column(AVERAGE, "accuracy"))
    protocol = _protocol(recipe, subjects, judge)
    return Comparison(recipe.title, protocol, tuple(columns), tuple(rows), len(planned), tuple(failed))


def _protocol(recipe: Recipe, subjects: Sequence[Subject], judge: Judge) -> tuple[str, ...]:
    """How it was measured, one sentence a fact."""
    # Of a file the name alone: a table is read where the file does not lie.
    shared = ", ".join(f"{key} {short(x) if isinstance(x, str) else x}" for key, x in recipe.options.items())
    lines = [f"Options of all runs: {shared}." if shared else "All runs have the default options."]
    for subject in subjects:
        if subject.paper is not None and subject.paper.options:
            own = ", ".join(f"{name} {value}" for name, value in subject.paper.options.items())
            lines.append(f"{subject.name}: {own}.")
        lines += [
            f"Perplexity of {subject.name} on {column}: {len(rows):,} rows of {rows.shape[1]} tokens."
            for column, rows in subject.texts.items()
        ]
    if judge.tasks:
        counts = ", ".join(f"{name} {sum(len(t.items) for t in tasks):,}" for name, tasks in judge.tasks.items())
        lines.append(f"Zero-shot accuracy in %, by length-normalised likelihood where a task has it; items: {counts}.")
    trained = {run.label: run.training for subject in subjects for run, *_ in subject.runs if run.training is not None}
    for label, one in trained.items():
        which = f"{one.samples:,} rows of {one.length} tokens of {short(one.calibration)}"
        lines.append(f"{label}: LoRA on {which}, {one.epochs} epochs.")
    if seeds := recipe.grid.get("seed"):
        several = f"Mean over the seeds {', '.join(map(str, seeds))}, with the least and the most."
        lines.append(several if len(seeds) > 1 else f"Seed {seeds[0]}.")
    return tuple(lines)
