"""What recipes that prune nothing have in common: each dense model is measured once, and what was found is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from secateur.base.digests import digest, hash_of
from secateur.base.progress import Watcher
from secateur.commands.open import Job, open_job
from secateur.compare.grid import sources
from secateur.compare.recipe import Recipe, expand
from secateur.compare.run_store import RunStore


def measure_each(
    recipe: Recipe,
    models: Sequence[str],
    out: Path,
    measure: Callable[[Job], dict[str, Any]],
    *,
    what: str,
    device: str,
    trust_remote_code: bool,
    watcher: Watcher,
) -> dict[str, dict[str, Any]]:
    """Open every model, then measure those that are not in the folder yet.

    Args:
        recipe: of any kind but `grid`.
        models: see `compare`.
        out: the folder; see `RunStore`.
        measure: from an open model with calibration rows to what JSON holds; the kind of the recipe, the model's
            weights, the rows and the blocks decide it.
        what: it measures, in words.
        device: see `compare`.
        trust_remote_code: see `compare`.
        watcher: told about progress.

    Returns:
        What `measure` has given, by the models' names.

    Raises:
        SecateurError: for anything wrong with a model or the text, before the first is measured.
    """
    store = RunStore(out)
    store.check()
    jobs: dict[str, Job] = {}
    for name, source in sources(recipe, models):
        known = recipe.model_of(source)
        (run,) = expand(recipe, None if known is None else known[0])
        jobs[name] = open_job(
            source,
            run.options,
            device=device,
            trust_remote_code=trust_remote_code,
            watcher=watcher,
        )
    found: dict[str, dict[str, Any]] = {}
    with store:
        for name, job in jobs.items():
            decided_by = {
                "kind": recipe.kind,
                "fingerprint": job.stream.checkpoint.fingerprint,
                "blocks": f"{job.request.chosen.start}:{job.request.chosen.stop}",
                "rows": hash_of(job.text),
            }
            key = digest(decided_by)
            result = store.find(key)
            if result is None:
                watcher.note(f"{what} of {name}")
                result = measure(job)
                store.keep(key, decided_by, result)
            found[name] = result
    return found
