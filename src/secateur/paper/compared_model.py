"""Model of a comparison: opened once, with every run on it checked before the first run starts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.hashes import hash_json
from secateur.base.progress import Watcher, busy_reading
from secateur.base.services import Services
from secateur.base.words import first_duplicate
from secateur.commands.draw_rows import draw_rows
from secateur.commands.open_model import OpenRun, open_model
from secateur.commands.options import Options, RunOptions
from secateur.measure.evaluation import scored_rows
from secateur.measure.figures import short
from secateur.model.checkpoint import Checkpoint
from secateur.paper.recipe import PaperModel, Recipe, Run, expand, named
from secateur.retraining.retrain import check_retraining
from secateur.retraining.rows import training_rows
from secateur.text.calibration import check_calibration
from secateur.text.draw import CalibrationRows, RowRequest
from secateur.text.sources import RANDOM, SELF

_REQUESTED = frozenset(("sparsity", "plan", "blocks", "modules", "widths", "ridge", "round"))
"""Options that change neither the open model nor its rows; runs that differ only in these share an open model."""


class ModelRuns(NamedTuple):
    """Model to compare, with the runs on it."""

    name: str
    source: str
    """Folder, .gguf file or hub id."""
    paper: PaperModel | None
    """Entry of the recipe, if the paper measured this model."""
    runs: list[Run]


@dataclass(frozen=True)
class ComparedModel:
    """Opened model of a comparison, on which all runs were checked."""

    name: str
    paper: PaperModel | None
    checkpoint: Checkpoint
    tokenizer: Any
    texts: dict[str, Tensor]
    """Token ids to score (rows x length), by column."""
    runs: list[tuple[Run, OpenRun, CalibrationRows]]
    """Runs with their open models and rows. Resampled rows are missing, and random ids stand in for generated rows."""
    drawn: dict[RowRequest, CalibrationRows] = field(default_factory=dict)
    """Rows of earlier runs, by request, for later runs that need the same rows."""


def sources(recipe: Recipe, models: Sequence[str]) -> list[ModelRuns]:
    """Return every model with its runs: the given models, or the recipe's own if none are given."""
    found = []
    for source in models or [model.id for model in recipe.models.values()]:
        entry, paper = recipe.model_of(source) or (None, None)
        found.append(ModelRuns(short(source) if entry is None else entry, source, paper, expand(recipe, entry)))
    if not found:
        raise SecateurError("the recipe names no model; give one before the recipe")
    if (repeated := first_duplicate([model_runs.name for model_runs in found])) is not None:
        raise SecateurError(f"model {repeated} is given twice; leave one out, or rename its folder")
    return found


def open_compared_model(
    recipe: Recipe, model_runs: ModelRuns, run_options: RunOptions, watcher: Watcher
) -> ComparedModel:
    """Open a model and check all runs on it.

    Raises:
        SecateurError: The model, a text or a run is wrong.
    """
    columns = columns_of("texts", [named(text, short(text)) for text in recipe.evaluation.perplexity])
    # All runs are scored on rows of one length, even where the calibration length is an axis of the grid.
    shared = recipe.options | (model_runs.paper.options if model_runs.paper else {})
    length = recipe.evaluation.length or shared.get("length", Options.length)
    for text in columns.values():
        if text in (RANDOM, SELF):
            ids = "random token ids" if text == RANDOM else "rows that a model generates"
            raise SecateurError(f"{ids} cannot be scored; name a text file or a data set")
        check_calibration(text, length=length)
    for run in model_runs.runs:
        for source in run.options.sources:
            check_calibration(source, samples=run.options.samples, length=run.options.length)
        if run.training is not None:
            check_retraining(run_options.device, run.training.rank)
    opened: dict[str, tuple[OpenRun, CalibrationRows]] = {}
    found = []
    with busy_reading(watcher, "Checking all runs on", model_runs.source):
        for run in model_runs.runs:
            group = hash_json({k: v for k, v in asdict(run.options).items() if k not in _REQUESTED})
            try:
                if group not in opened:
                    first = open_model(model_runs.source, run.options, run_options)
                    opened[group] = first, draw_rows(first, dry=True)
                model, rows = opened[group]
                model = model.with_options(run.options)
                if run.training is not None:
                    training_rows(model.stream.checkpoint, run.training, run.training.token_count, Services())
            except SecateurError as error:
                raise SecateurError(f"{model_runs.name}, {run.row or 'run'}: {error}") from error
            found.append((run, model, rows))
    checkpoint = found[0][1].stream.checkpoint
    tokenizer, texts = checkpoint.tokenizer(), {}
    for column, text in columns.items():
        with busy_reading(watcher, "Reading", text):
            texts[column] = scored_rows(checkpoint, tokenizer, text, length, recipe.evaluation.tokens).ids
    return ComparedModel(model_runs.name, model_runs.paper, checkpoint, tokenizer, texts, found)


def columns_of(what: str, sources: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return texts or tasks by the name of their column; raise `SecateurError` where two have the same name."""
    names = [name for name, _ in sources]
    if (repeated := first_duplicate(names)) is not None:
        raise SecateurError(f"two {what} are called {repeated}; give them different names, NAME={what[:-1].upper()}")
    return dict(sources)
