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
from secateur.compare.recipe import Recipe, expand
from secateur.compare.run_store import RunStore


def measure_each(
    recipe: Recipe,
    models: Sequence[str],
    out: Path,
    measure: Callable[[OpenRun, Tensor], dict[str, Any]],
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
        measure: from an open model and calibration rows to what JSON holds; the kind of the recipe, the model's
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
    runs: dict[str, tuple[OpenRun, Tensor]] = {}
    for name, source in sources(recipe, models):
        known = recipe.model_of(source)
        (run,) = expand(recipe, None if known is None else known[0])
        running = Running(device=device, trust_remote_code=trust_remote_code)
        opened = open_model(source, run.options, running, watcher=watcher)
        runs[name] = opened, draw_rows(opened, fitted=False).text
    found: dict[str, dict[str, Any]] = {}
    with store:
        for name, (opened, text) in runs.items():
            decided_by = {
                "kind": recipe.kind,
                "fingerprint": opened.stream.checkpoint.fingerprint,
                "blocks": f"{opened.request.chosen.start}:{opened.request.chosen.stop}",
                "rows": hash_of(text),
            }
            key = digest(decided_by)
            result = store.find(key)
            if result is None:
                watcher.note(f"{what} of {name}")
                result = measure(opened, text)
                store.keep(key, decided_by, result)
            found[name] = result
    return found
