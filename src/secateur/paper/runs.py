"""Runs of a comparison: the inputs that decide the result of each run, and its steps."""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from secateur.base.hashes import hash_json, hash_rows
from secateur.base.services import Services
from secateur.commands.draw_rows import draw_rows
from secateur.commands.fit_blocks import fit_blocks
from secateur.commands.open_model import OpenRun
from secateur.commands.plan_widths import plan_widths
from secateur.commands.survey_file import survey_key
from secateur.commands.survey_model import survey_model
from secateur.commands.write_model import write_model
from secateur.model.axes import Width, axis_kinds
from secateur.model.units.channels import CHANNELS
from secateur.model.units.experts import EXPERTS
from secateur.model.units.heads import HEADS_PER_GROUP
from secateur.paper.compared_model import ComparedModel
from secateur.paper.recipe import Run
from secateur.paper.run_store import RunStore
from secateur.paper.scorer import Scorer
from secateur.plan.meters import parameter_meter
from secateur.report.summary import Summary
from secateur.retraining.retrain import retrain
from secateur.retraining.rows import training_rows

DENSE = "dense"
"""Name of the row of a model before pruning."""


@dataclass(frozen=True)
class PlannedRun:
    """Run of a comparison, or the scoring of a dense model."""

    model: ComparedModel
    run: Run | None
    """Run of the recipe; None for the dense model."""
    open: OpenRun
    decided_by: dict[str, Any]
    """Inputs that decide the result, as JSON values."""

    @cached_property
    def key(self) -> str:
        """Hash of the inputs, which names the result in the store."""
        return hash_json(self.decided_by)

    @property
    def description(self) -> str:
        """Name of model, method and seed."""
        if self.run is None:
            return f"{self.model.name} {DENSE}"
        seed = self.run.place("seed")
        return f"{self.model.name} {self.run.row}" + ("" if seed is None else f", seed {seed}")

    def execute(self, scorer: Scorer, store: RunStore) -> dict[str, Any]:
        """Prune, score and delete the model; return scores and sizes as JSON values."""
        start = time.perf_counter()
        folder, sparsity = self.model.checkpoint.path, 0.0
        parameters = round(parameter_meter(self.open.stream).dense)
        widths = [block.width for block in self.open.stream.blocks]
        if self.run is not None:
            folder = store.scratch / "model"
            summary = prune_run(self.open, self.model, folder, store)
            sparsity, parameters, widths = summary.sparsity, summary.parameters[1], summary.pruned_widths()
            if self.run.training is not None:
                pruned, folder = folder, store.scratch / "retrained"
                device = "cpu" if scorer.device.type == "cpu" else "auto"
                teacher = self.run.training.teacher or str(self.model.checkpoint.path)
                training = replace(self.run.training, teacher=teacher)
                retrain(pruned, folder, training, device=device, overwrite=True, watcher=scorer.watcher)
        scores = scorer.score(folder, self.model, self.description)
        for name in ("model", "retrained"):
            shutil.rmtree(store.scratch / name, ignore_errors=True)
        return scores | {
            "sparsity": sparsity,
            "parameters": parameters,
            "heads": _count(widths, HEADS_PER_GROUP),
            "channels": _count(widths, CHANNELS, EXPERTS),
            "seconds": time.perf_counter() - start,
        }


def prune_run(run: OpenRun, model: ComparedModel, folder: Path, store: RunStore) -> Summary:
    """Execute the steps of `prune` after opening; rows are drawn once, surveys are kept in the comparison's folder."""
    run = run.timed_from_now()
    if (rows := model.drawn.get(run.row_request)) is None:
        rows = model.drawn[run.row_request] = draw_rows(run)
    run = run.with_run_options(survey=store.survey_file(survey_key(run, rows.selection)), overwrite=True)
    plan = plan_widths(run, rows, survey_model(run, rows))
    return write_model(run, rows, plan, fit_blocks(run, rows, plan), folder)


def _count(widths: Sequence[Width], *axes: str) -> int:
    """Return the number of units along some axes in all blocks."""
    return sum(axis_kinds()[axis].count(width) for axis in axes for width in widths)


def planned_runs(model: ComparedModel, scorer: Scorer) -> Iterator[PlannedRun]:
    """Yield all runs on a model, the dense one first, each with the inputs that decide its result."""
    dense = scorer.decided_by(model)
    yield PlannedRun(model, None, model.runs[0][1], dense)
    for run, opened, rows in model.runs:
        training, trained = run.training, None
        if training is not None:
            trained = training_rows(model.checkpoint, training, training.token_count, Services())
        own = {
            "options": asdict(opened.options),
            # Random ids that stand in for generated rows decide these together with the options.
            "rows": [hash_rows(group) for group in (rows.selection, *rows.grouped.groups)],
            # Contents of a file with a plan or with shares.
            "given": repr(opened.request.plan_from_file),
            "training": training and asdict(training),
            "training rows": None if trained is None else hash_rows(trained.train),
        }
        yield PlannedRun(model, run, replace(opened, stream=opened.stream.using(watcher=scorer.watcher)), dense | own)
