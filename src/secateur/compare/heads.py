"""Recipes of the kind `graph`: which heads of a block attend alike, in the dense models, drawn as graphs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.base.files import write_whole
from secateur.base.progress import Watcher
from secateur.commands.open import OpenRun
from secateur.commands.options import Running
from secateur.compare.dense import measure_each
from secateur.compare.plots import plot_graphs
from secateur.compare.recipe import Recipe
from secateur.criteria.head_distances import head_distances


def compare_heads(recipe: Recipe, models: Sequence[str], out: Path, *, watcher: Watcher, **where: Any) -> None:
    """Measure how far apart the heads of every chosen block attend, in nats; `table.json` and `graph.png` tell it.

    Arguments and errors are those of `compare`; besides, a model's attention may be one that cannot be watched.
    """
    assert recipe.tau is not None

    def measure(run: OpenRun, text: Tensor) -> dict[str, Any]:
        distances = head_distances(run.stream, text, blocks=run.request.chosen, watcher=watcher)
        return {str(block): matrix.tolist() for block, matrix in distances.items()}

    results = measure_each(
        recipe, models, out, measure, what="Distances between heads", watcher=watcher, running=Running(**where)
    )
    table = {"title": recipe.title, "tau": recipe.tau, "unit": "nats", "models": results}
    write_whole(out / "table.json", json.dumps(table, indent=2) + "\n")
    found = {
        name: {int(block): torch.tensor(matrix, dtype=torch.float64) for block, matrix in blocks.items()}
        for name, blocks in results.items()
    }
    plot_graphs(found, recipe.tau, out / "graph.png")
