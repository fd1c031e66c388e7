"""What recipes that prune nothing have in common: each dense model is measured once, and what was found is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.base.files import digest, hash_of
from secateur.base.progress import Watcher
from secateur.commands.open import OpenRun, open_model
from secateur.commands.options import Running
from secateur.commands.steps import draw_rows
from secateur.compare.grid import sources
from secateur.compare.recipe import Recipe
from secateur.compare.run_store import RunStore


def measure_each(
    recipe: Recipe,
    models: Sequence[str],
    out: Path,
    measure: Callable[[OpenRun, Tensor], dict[str, Any]],
    *,
    what: str,
    watcher: Watcher,
    running: Running,
) -> dict[str, dict[str, Any]]:
    """What `measure` gives for every model, by name; models that are in the folder are not measured again.

    Args:
        recipe: of any kind but `grid`.
        models: see `compare`.
        out: the folder; see `RunStore`.
        measure: from an open model and calibration rows (rows x length) to what JSON holds; the kind of the recipe, the
            model's weights, the rows and the blocks decide it.
        what: it measures, in words.
        watcher: told about progress.
        running: see `compare`.

    Raises:
        SecateurError: for anything wrong with a model or the text, before the first is measured.
    """
    store = RunStore(out)
    store.check()
    opened: dict[str, tuple[OpenRun, Tensor]] = {}
    for asked in sources(recipe, models):
        run = open_model(asked.source, asked.runs[0].options, running, watcher=watcher)
        opened[asked.name] = run, draw_rows(run, fitted=False).text
    found: dict[str, dict[str, Any]] = {}
    with store:
        for name, (run, text) in opened.items():
            decided_by = {
                "kind": recipe.kind,
                "fingerprint": run.stream.checkpoint.fingerprint,
                "blocks": f"{run.request.chosen.start}:{run.request.chosen.stop}",
                "rows": hash_of(text),
            }
            result = store.find(key := digest(decided_by))
            if result is None:
                watcher.note(f"{what} of {name}")
                result = measure(run, text)
                store.keep(key, decided_by, result)
            found[name] = result
    return found
