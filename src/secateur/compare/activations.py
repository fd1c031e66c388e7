"""Recipes of the kind `activations`: how large activations are in each block of several models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.base.progress import Silent, Watcher
from secateur.commands.options import Running
from secateur.compare.dense import measure_each
from secateur.compare.plots import plot_magnitudes
from secateur.compare.recipe import Recipe
from secateur.compare.tables import write_table
from secateur.model.arena import Arena
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream


@dataclass(frozen=True)
class Magnitudes:
    """Mean absolute activations of one block, over all tokens and dimensions."""

    stream: float
    """Of the residual stream that enters the block."""
    heads: float
    """Of what the attention's output layer sees."""
    channels: float
    """Of what the feed-forward's output layer sees."""


def compare_activations(recipe: Recipe, models: Sequence[str], out: Path, *, watcher: Watcher, **where: Any) -> None:
    """Measure every model on the recipe's calibration rows; `table.*` and `activations.png` tell what was found.

    Arguments and errors are those of `compare`.
    """
    results = measure_each(
        recipe,
        models,
        out,
        lambda run, text: {"blocks": [asdict(block) for block in magnitudes(run.stream, text, watcher=watcher)]},
        what="Activations",
        watcher=watcher,
        running=Running(**where),
    )
    found: dict[str, list[dict[str, float]]] = {model: result["blocks"] for model, result in results.items()}
    places = [field.name for field in fields(Magnitudes)]
    head = ["model", "block", *places]
    rows = [
        (model, index, [block[place] for place in places])
        for model, blocks in found.items()
        for index, block in enumerate(blocks)
    ]
    write_table(
        out,
        title=recipe.title,
        notes=["Mean absolute activation, over all tokens and dimensions."],
        shown=[head, *([model, str(index), *(f"{mean:.4g}" for mean in means)] for model, index, means in rows)],
        whole=[head, *([model, index, *means] for model, index, means in rows)],
        contents={"title": recipe.title, "models": found},
    )
    plot_magnitudes(found, out / "activations.png")


def magnitudes(stream: BlockStream, rows: Tensor | Rows, *, watcher: Watcher | None = None) -> list[Magnitudes]:
    """Mean |x| in every block of the dense model, one of which is in memory at a time; rows are rows x length.

    Raises:
        SecateurError: a block gives NaN or infinite values.
    """
    rows, result = Rows.of(rows), []
    with Arena() as arena:
        hidden = stream.embed(rows, arena)
        for index in (watcher or Silent()).track(range(len(stream)), "Measure"):
            block = stream.blocks[index]
            entering, heads, channels = _Mean(), _Mean(), _Mean()
            watch = {block.attention.sink: heads.add, block.feed_forward.sink: channels.add}
            with stream.filled(index) as layer:
                for at in rows.batches():
                    before = hidden[at]
                    entering.add(before, before)
                    hidden[at] = stream.run_through(index, layer, before, at.group, watch=watch)
            result.append(Magnitudes(*(mean.total / mean.count for mean in (entering, heads, channels))))
    return result


class _Mean:
    """A running mean of absolute values, in float64."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, x: Tensor, _: Tensor) -> None:
        """Take a layer's input; its output is of no interest."""
        # Row by row in float32, then float64 on the host: not every accelerator has the latter.
        self.total += float(x.abs().flatten(0, -2).mean(-1).cpu().to(torch.float64).sum()) * x.shape[-1]
        self.count += x.numel()
