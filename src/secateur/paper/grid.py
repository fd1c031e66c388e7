"""`secateur compare`: every run of a recipe under one protocol, each pruned as `prune` does, scored and thrown away.

All models, texts, tasks and runs are checked before the first is carried out. What runs have in common is made once:
token ids of a text, rows that a model writes, the survey that several widths and recoveries start from, the dense
scores. A finished run is a small file under a name that what decides it gives, so that a restart does only what is
missing.
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
    """Carry out a recipe of the kind `grid`.

    Args:
        models: folders, .gguf files or hub ids; the recipe's own where there are none.
        out: the folder that keeps finished runs; see `RunStore`.
        task_path: a folder with lm-eval task files of one's own.
        done: called with what there is after each run, and where nothing was left to do.
        where: fields of `RunOptions`: the device, and whether the checkpoints' own code may run.

    Returns:
        All that is finished. A run that turns out impossible is left out, and named in `failed`.

    Raises:
        SecateurError: for anything wrong with a run, a model, a text or a task that can be seen before the first run.
    """
    run_options = RunOptions(**where)
    device, store = pick_device(run_options.device), RunStore(out)
    store.check()
    scorer = Scorer(task_columns(recipe, task_path, watcher), device, watcher)
    with cached_token_ids():
        compared = [open_compared_model(recipe, asked, run_options, watcher) for asked in sources(recipe, models)]
        for model in compared:
            first = model.runs[0][1]
            # On the disk that the comparison will be on.
            beside = out.absolute().parent / f".{out.name}.scratch"
            first.request.format.output(beside, overwrite=True).check()
        with store:
            return _carry_out(recipe, compared, scorer, store, done)


def _carry_out(
    recipe: Recipe, models: Sequence[ComparedModel], scorer: Scorer, store: RunStore, done: Callable[[Comparison], None]
) -> Comparison:
    """All runs that are not in the store yet, one after the other."""
    watcher, planned = scorer.watcher, [one for model in models for one in planned_runs(model, scorer)]
    results = {one.key: found for one in planned if (found := store.find(one.key)) is not None}
    failed: list[str] = []
    if results:
        watcher.note(f"{sum(one.key in results for one in planned)} of {len(planned)} runs are in {store.path} already")
    for number, one in enumerate(planned, start=1):
        if one.key in results:
            continue
        watcher.note(f"Run {number} of {len(planned)}: {one.what}")
        try:
            results[one.key] = one.execute(scorer, store)
        except SecateurError as error:
            # Found by running alone; it says nothing about the other runs.
            failed.append(f"{one.what}: {error}")
            watcher.note(failed[-1])
            continue
        store.keep(one.key, one.decided_by, results[one.key])
        done(gather_comparison(recipe, models, scorer, planned, results, failed))
    whole = gather_comparison(recipe, models, scorer, planned, results, failed)
    done(whole)
    return whole
