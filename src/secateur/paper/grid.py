"""Runs of a recipe for `secateur compare`, all under one protocol: each model is pruned, scored and deleted.

All models, texts, tasks and runs are checked before the first run starts. Results that runs share are computed once:
token ids of a text, rows that a model generates, surveys, and scores of dense models. The result of a finished run is a
small file whose name is a hash of the run's inputs, so that a restarted comparison computes only what is missing.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from secateur.base.device import pick_device
from secateur.base.errors import SecateurError
from secateur.base.progress import Watcher
from secateur.commands.options import RunOptions
from secateur.paper.compared_model import ComparedModel, open_compared_model, sources
from secateur.paper.comparison import Comparison
from secateur.paper.gather import gather_comparison
from secateur.paper.recipe import Recipe
from secateur.paper.run_store import RunStore
from secateur.paper.runs import planned_runs
from secateur.paper.scorer import Scorer, task_columns
from secateur.text.calibration import cached_token_ids


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
    """Execute the runs of a recipe of the kind `grid`.

    Args:
        recipe: The recipe.
        models: Folders, .gguf files or hub ids; the recipe's own models if empty.
        out: The folder that keeps finished runs; see `RunStore`.
        task_path: A folder with the user's own lm-eval task files.
        done: Called with the results so far after each run, and once at the end.
        watcher: Progress output.
        where: Fields of `RunOptions`: the device, and whether the checkpoints' own code may run.

    Returns:
        The results of all finished runs. A run that fails is left out and named in `failed`.

    Raises:
        SecateurError: A run, model, text or task is wrong in a way that can be found before the first run.
    """
    run_options = RunOptions(**where)
    device, store = pick_device(run_options.device), RunStore(out)
    store.check()
    scorer = Scorer(task_columns(recipe, task_path, watcher), device, watcher)
    with cached_token_ids():
        compared = [
            open_compared_model(recipe, model_runs, run_options, watcher) for model_runs in sources(recipe, models)
        ]
        for model in compared:
            first = model.runs[0][1]
            # Pruned models are written to the disk of the comparison.
            scratch = out.absolute().parent / f".{out.name}.scratch"
            first.request.format.output(scratch, overwrite=True).check()
        with store:
            return _execute(recipe, compared, scorer, store, done)


def _execute(
    recipe: Recipe, models: Sequence[ComparedModel], scorer: Scorer, store: RunStore, done: Callable[[Comparison], None]
) -> Comparison:
    """Execute all runs whose results are not in the store yet, one after another."""
    watcher, planned = scorer.watcher, [one for model in models for one in planned_runs(model, scorer)]
    results = {one.key: found for one in planned if (found := store.find(one.key)) is not None}
    failed: list[str] = []
    if results:
        watcher.note(f"{sum(one.key in results for one in planned)} of {len(planned)} runs are in {store.path} already")
    for number, one in enumerate(planned, start=1):
        if one.key in results:
            continue
        watcher.note(f"Run {number} of {len(planned)}: {one.description}")
        try:
            results[one.key] = one.execute(scorer, store)
        except SecateurError as error:
            # The other runs may still succeed.
            failed.append(f"{one.description}: {error}")
            watcher.note(failed[-1])
            continue
        store.keep(one.key, one.decided_by, results[one.key])
        done(gather_comparison(recipe, models, scorer, planned, results, failed))
    comparison = gather_comparison(recipe, models, scorer, planned, results, failed)
    done(comparison)
    return comparison
