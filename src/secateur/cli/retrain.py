"""`secateur retrain`: a pruned folder, retrained with LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import parameters
from secateur.cli.terminal import Bars
from secateur.commands.options import Options


def retrain(
    folder: parameters.PrunedFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    calibration: Annotated[
        str, typer.Option(help="Text to train on: a file, - or a data set; see secateur prune.")
    ] = Options.calibration,
    samples: Annotated[int, typer.Option(help="Rows drawn from it at random.")] = 1024,
    length: Annotated[int, typer.Option(help="Tokens in each row.")] = 128,
    epochs: Annotated[int, typer.Option(help="Passes over the rows.")] = 2,
    batch: Annotated[int, typer.Option(help="Rows in a step.")] = 16,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="At the start; it falls to zero.")] = 1e-4,
    seed: Annotated[int, typer.Option(help="Decides the rows, their order and the adapters' start.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: auto (CUDA if there is any) or cpu.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it is a model folder.")] = False,
) -> None:
    """Retrain a pruned model in DIR with LoRA, merged into the weights. Needs the extra `lora`.

    Example: secateur retrain ./SmolLM2-pruned ./SmolLM2-retrained --calibration text.txt
    """
    bars = Bars()
    with bars.busy("Loading torch and transformers"):
        from secateur.compare.retrain import retrain as run
        from secateur.compare.training import Training

    training = Training(
        calibration=calibration,
        samples=samples,
        length=length,
        epochs=epochs,
        batch=batch,
        rank=rank,
        learning_rate=learning_rate,
        seed=seed,
    )
    done = run(folder, out, training, device=device, overwrite=overwrite, watcher=bars)
    before, after = done.perplexity
    typer.echo(f"Perplexity on rows not trained on: {before:.3f} before, {after:.3f} after. Written to {done.path}")
