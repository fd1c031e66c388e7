"""Recipes of the kind `graph`: which heads of a block attend alike, in the dense models, drawn as graphs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.base.files import write_whole
from secateur.base.progress import Silent, Watcher
from secateur.commands.open import OpenRun
from secateur.compare.measure_dense import measure_each
from secateur.compare.plots import plot_graphs
from secateur.compare.recipe import Recipe
from secateur.criteria.head_distances import head_distances


def compare_heads(
    recipe: Recipe,
    models: Sequence[str],
    out: Path,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    watcher: Watcher | None = None,
) -> dict[str, dict[int, Tensor]]:
    """Measure how far apart the heads of every chosen block attend, and write the distances and a plot.

    Args:
        recipe: of the kind `graph`.
        models: see `compare`.
        out: the folder for `table.json` and `graph.png`; measured models stay there.
        device: see `compare`.
        trust_remote_code: see `compare`.
        watcher: told about progress.

    Returns:
        Of every model the distances of each block, in nats (h x h), float64.

    Raises:
        SecateurError: for anything wrong with a model or the text, before the first is measured; a model whose
            attention cannot be watched.
    """
    tau = recipe.tau
    assert tau is not None
    watcher = watcher or Silent()

    def measure(run: OpenRun, text: Tensor) -> dict[str, Any]:
        distances = head_distances(run.stream, text, blocks=run.request.chosen, watcher=watcher)
        return {str(block): matrix.tolist() for block, matrix in distances.items()}

    results = measure_each(
        recipe,
        models,
        out,
        measure,
        what="Distances between heads",
        device=device,
        trust_remote_code=trust_remote_code,
        watcher=watcher,
    )
    table = {"title": recipe.title, "tau": tau, "unit": "nats", "models": results}
    write_whole(out / "table.json", json.dumps(table, indent=2) + "\n")
    found = {
        name: {int(block): torch.tensor(matrix, dtype=torch.float64) for block, matrix in blocks.items()}
        for name, blocks in results.items()
    }
    plot_graphs(found, tau, out / "graph.png")
    return found
