"""Recipes that measure dense models: mean activations (`activations`) and similar heads (`graph`)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import secateur
from paper.compare import models_of
from paper.plots import plot_graphs, plot_magnitudes
from paper.recipe import Recipe, expand
from paper.store import Store, hash_json, hash_rows, write
from paper.tables import write_table
from secateur import Bars, BlockStream, Rows, RunOptions

PLACES = ("stream", "heads", "channels")
"""Places in a block where activations are measured: the residual stream that enters the block, and the inputs of the
output projections of the attention and of the feed-forward."""


def compare_dense(
    recipe: Recipe, sources: Sequence[str], out: Path, *, run_options: RunOptions, watcher: Bars
) -> list[str]:
    """Measure every dense model whose result is not in the folder yet, then write tables and a plot of all models.

    Args:
        recipe: A recipe of the kind `activations` or `graph`.
        sources: Folders, .gguf files or hub ids; the recipe's own models if empty.
        out: The folder of the comparison; see `Store`.
        run_options: The device, and whether the checkpoints' own code may run.
        watcher: Progress output.

    Returns:
        Names of the written files.

    Raises:
        SecateurError: A model or the text cannot be read, found before the first measurement; or, in a recipe of the
            kind `graph`, the attention of a model cannot be observed.
    """
    store = Store(out)
    store.check()
    opened = {}
    for model in models_of(recipe, sources):
        run = secateur.open_model(model.source, expand(recipe, model.entry)[0].options, run_options)
        opened[model.name] = run, secateur.draw_rows(run, resample=False).selection
    found: dict[str, Any] = {}
    with store:
        for name, (run, rows) in opened.items():
            decides = {"kind": recipe.kind, "blocks": run.options.blocks, "rows": hash_rows(rows)}
            inputs = decides | run.stream.checkpoint.identity
            result = store.find(key := hash_json(inputs))
            if result is None:
                stream = run.stream.using(watcher=watcher)
                if recipe.kind == "activations":
                    watcher.note(f"Activations of {name}")
                    result = {"blocks": magnitudes(stream, rows, watcher)}
                else:
                    watcher.note(f"Distances between heads of {name}")
                    blocks = run.options.block_range(len(stream))
                    distances = secateur.head_distances(stream, rows, blocks=blocks, watcher=watcher)
                    result = {str(block): matrix.tolist() for block, matrix in distances.items()}
                store.keep(key, inputs, result)
            found[name] = result
    return (_write_activations if recipe.kind == "activations" else _write_graph)(recipe, found, out)


def magnitudes(stream: BlockStream, ids: Tensor, watcher: Bars) -> list[dict[str, float]]:
    """Return the mean absolute activations at the places of every block, with one block in memory at a time.

    Args:
        stream: The dense model.
        ids: Token ids (rows x length).
        watcher: Progress output.

    Raises:
        SecateurError: A block gives NaN or infinite values.
    """
    rows, result = Rows.of(ids), []
    with stream.arena() as arena:
        hidden = stream.embed(rows, arena)
        for index in watcher.track(range(len(stream)), "Measure"):
            block = stream.blocks[index]
            means = {place: _Mean() for place in PLACES}
            watch = {
                block.modules[0].output_layer: means["heads"].add,
                block.modules[-1].output_layer: means["channels"].add,
            }
            with stream.filled(index) as layer:
                for at in rows.batches():
                    before = hidden[at]
                    means["stream"].add(stream.residual(before), before)
                    hidden[at] = stream.run_through(index, layer, before, at.group, watch=watch)
            result.append({place: mean.total / mean.count for place, mean in means.items()})
    return result


class _Mean:
    """Running mean of absolute values, in float64."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, x: Tensor, _: Tensor) -> None:
        """Add the input of a layer; its output, the second argument, is not used."""
        # Means of rows are float32 on the device; their sum is float64 on the CPU, since some accelerators lack it.
        self.total += float(x.abs().flatten(0, -2).mean(-1).cpu().to(torch.float64).sum()) * x.shape[-1]
        self.count += x.numel()


def _write_activations(recipe: Recipe, results: dict[str, Any], out: Path) -> list[str]:
    """Write tables with a row for each block, and a plot over the depth: figure 5 of the paper."""
    found: dict[str, list[dict[str, float]]] = {model: result["blocks"] for model, result in results.items()}
    head = ["model", "block", *PLACES]
    rows = [(model, at, [block[place] for place in PLACES]) for model in found for at, block in enumerate(found[model])]
    write_table(
        out,
        title=recipe.title,
        notes=["Mean absolute activation, over all tokens and dimensions."],
        shown=[head, *([model, str(at), *(f"{mean:.4g}" for mean in means)] for model, at, means in rows)],
        whole=[head, *([model, at, *means] for model, at, means in rows)],
        contents={"title": recipe.title, "models": found},
    )
    plot_magnitudes(found, out / "activations.png")
    return ["table.md", "table.csv", "table.json", "activations.png"]


def _write_graph(recipe: Recipe, results: dict[str, Any], out: Path) -> list[str]:
    """Write the distances between heads in nats (heads x heads, by block), and a graph of similar heads: figure 3."""
    assert recipe.tau is not None
    contents = {"title": recipe.title, "tau": recipe.tau, "unit": "nats", "models": results}
    write(out / "table.json", json.dumps(contents, indent=2) + "\n")
    plot_graphs(results, recipe.tau, out / "graph.png")
    return ["table.json", "graph.png"]
