"""Recipes that measure dense models: mean activations (`activations`) and similar heads (`graph`)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.base.files import write_atomically
from secateur.base.hashes import hash_json, hash_rows
from secateur.base.progress import Silent, Watcher
from secateur.base.services import Services
from secateur.commands.draw_rows import draw_rows
from secateur.commands.open_model import OpenRun, open_model
from secateur.commands.options import RunOptions
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.paper.compared_model import sources
from secateur.paper.plots import plot_graphs, plot_magnitudes
from secateur.paper.recipe import Recipe
from secateur.paper.run_store import RunStore
from secateur.paper.tables import write_table
from secateur.survey.head_distances import head_distances


@dataclass(frozen=True)
class Magnitudes:
    """Mean absolute activations in one block, over all tokens and dimensions."""

    stream: float
    """Mean of the residual stream that enters the block."""
    heads: float
    """Mean of the input of the attention's output projection."""
    channels: float
    """Mean of the input of the feed-forward's output projection."""


def compare_dense(recipe: Recipe, models: Sequence[str], out: Path, *, watcher: Watcher, **where: Any) -> str:
    """Measure every dense model whose result is not in the folder yet, then write tables and a plot of all models.

    Args:
        recipe: A recipe of the kind `activations` or `graph`.
        models: Folders, .gguf files or hub ids; the recipe's own models if empty.
        out: The folder of the comparison; see `RunStore`.
        watcher: Progress output.
        where: Fields of `RunOptions`, as in `compare`.

    Returns:
        Names of the written files, as words for a message.

    Raises:
        SecateurError: A model or the text cannot be read, found before the first measurement; or, in a recipe of the
            kind `graph`, the attention of a model cannot be observed.
    """
    store = RunStore(out)
    store.check()
    opened: dict[str, tuple[OpenRun, Tensor]] = {}
    for model_runs in sources(recipe, models):
        run = open_model(
            model_runs.source, model_runs.runs[0].options, RunOptions(**where), services=Services(watcher=watcher)
        )
        opened[model_runs.name] = run, draw_rows(run, resample=False).selection
    found: dict[str, dict[str, Any]] = {}
    with store:
        for name, (run, text) in opened.items():
            decided_by = {
                "kind": recipe.kind,
                **run.stream.checkpoint.identity,
                "blocks": f"{run.request.block_range.start}:{run.request.block_range.stop}",
                "rows": hash_rows(text),
            }
            result = store.find(key := hash_json(decided_by))
            if result is None:
                result = _measure(recipe.kind, name, run, text, watcher)
                store.keep(key, decided_by, result)
            found[name] = result
    return (_write_activations if recipe.kind == "activations" else _write_graph)(recipe, found, out)


def magnitudes(stream: BlockStream, rows: Tensor | Rows, *, watcher: Watcher | None = None) -> list[Magnitudes]:
    """Return the mean absolute activations in every block of a dense model, with one block in memory at a time.

    Args:
        stream: The dense model.
        rows: Token ids (rows x length).
        watcher: Progress output.

    Raises:
        SecateurError: A block gives NaN or infinite values.
    """
    rows, result = Rows.of(rows), []
    with stream.arena() as arena:
        hidden = stream.embed(rows, arena)
        for index in (watcher or Silent()).track(range(len(stream)), "Measure"):
            block = stream.blocks[index]
            entering, heads, channels = _Mean(), _Mean(), _Mean()
            watch = {block.attention.output_layer: heads.add, block.feed_forward.output_layer: channels.add}
            with stream.filled(index) as layer:
                for at in rows.batches():
                    before = hidden[at]
                    entering.add(stream.residual(before), before)
                    hidden[at] = stream.run_through(index, layer, before, at.group, watch=watch)
            result.append(Magnitudes(*(mean.total / mean.count for mean in (entering, heads, channels))))
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


def _measure(kind: str, name: str, run: OpenRun, text: Tensor, watcher: Watcher) -> dict[str, Any]:
    """Measure one model on calibration rows (rows x length), and return the result as JSON values."""
    if kind == "activations":
        watcher.note(f"Activations of {name}")
        return {"blocks": [asdict(block) for block in magnitudes(run.stream, text, watcher=watcher)]}
    watcher.note(f"Distances between heads of {name}")
    distances = head_distances(run.stream, text, blocks=run.request.block_range, watcher=watcher)
    return {str(block): matrix.tolist() for block, matrix in distances.items()}


def _write_activations(recipe: Recipe, results: dict[str, dict[str, Any]], out: Path) -> str:
    """Write tables with a row for each block, and a plot over the depth: figure 5 of the paper."""
    found: dict[str, list[dict[str, float]]] = {model: result["blocks"] for model, result in results.items()}
    head = ["model", "block", *(field.name for field in fields(Magnitudes))]
    rows = [
        (model, at, [block[place] for place in head[2:]]) for model in found for at, block in enumerate(found[model])
    ]
    write_table(
        out,
        title=recipe.title,
        notes=["Mean absolute activation, over all tokens and dimensions."],
        shown=[head, *([model, str(at), *(f"{mean:.4g}" for mean in means)] for model, at, means in rows)],
        whole=[head, *([model, at, *means] for model, at, means in rows)],
        contents={"title": recipe.title, "models": found},
    )
    plot_magnitudes(found, out / "activations.png")
    return "table.md, table.csv, table.json and activations.png"


def _write_graph(recipe: Recipe, results: dict[str, dict[str, Any]], out: Path) -> str:
    """Write the distances between heads in nats (heads x heads, by block), and a graph of similar heads: figure 3."""
    assert recipe.tau is not None
    contents = {"title": recipe.title, "tau": recipe.tau, "unit": "nats", "models": results}
    write_atomically(out / "table.json", json.dumps(contents, indent=2) + "\n")
    plot_graphs(results, recipe.tau, out / "graph.png")
    return "table.json and graph.png"
