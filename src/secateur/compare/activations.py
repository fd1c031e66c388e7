"""Recipes of the kind `activations`: how large activations are in each block of several models."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.base.files import write_whole
from secateur.base.progress import Silent, Watcher
from secateur.commands.open import OpenRun
from secateur.compare.magnitudes import Magnitudes, magnitudes
from secateur.compare.measure_dense import measure_each
from secateur.compare.plots import plot_magnitudes
from secateur.compare.recipe import Recipe

PLACES = ("stream", "heads", "channels")


def compare_activations(
    recipe: Recipe,
    models: Sequence[str],
    out: Path,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    watcher: Watcher | None = None,
) -> dict[str, list[Magnitudes]]:
    """Measure every model on the recipe's calibration rows, and write a table and a plot.

    Args:
        recipe: of the kind `activations`.
        models: see `compare`.
        out: the folder for `table.md`, `table.csv`, `table.json` and `activations.png`; measured models stay there.
        device: see `compare`.
        trust_remote_code: see `compare`.
        watcher: told about progress.

    Raises:
        SecateurError: for anything wrong with a model or the text, before the first is measured.
    """
    watcher = watcher or Silent()

    def measure(run: OpenRun, text: Tensor) -> dict[str, Any]:
        return {"blocks": [asdict(block) for block in magnitudes(run.stream, text, watcher=watcher)]}

    results = measure_each(
        recipe,
        models,
        out,
        measure,
        what="Activations",
        device=device,
        trust_remote_code=trust_remote_code,
        watcher=watcher,
    )
    found = {name: [Magnitudes(**block) for block in result["blocks"]] for name, result in results.items()}
    _write(recipe.title, found, out)
    return found


def _write(title: str, found: dict[str, list[Magnitudes]], out: Path) -> None:
    """Table and plot."""
    rows = [
        (model, index, *(getattr(block, place) for place in PLACES))
        for model, blocks in found.items()
        for index, block in enumerate(blocks)
    ]
    head = ("model", "block", *PLACES)
    lines = [f"# {title}", "", "Mean absolute activation, over all tokens and dimensions.", ""]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for model, index, *values in rows:
        lines.append(f"| {model} | {index} | {' | '.join(f'{value:.4g}' for value in values)} |")
    write_whole(out / "table.md", "\n".join(lines) + "\n")
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([head, *rows])
    write_whole(out / "table.csv", file.getvalue())
    by_model = {model: [asdict(block) for block in blocks] for model, blocks in found.items()}
    write_whole(out / "table.json", json.dumps({"title": title, "models": by_model}, indent=2) + "\n")
    plot_magnitudes(found, out / "activations.png")
