"""`secateur export`: a pruned folder in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from secateur.base.errors import SecateurError
from secateur.cli.arguments import PrunedFolder
from secateur.cli.generate import Only, generated
from secateur.cli.terminal import Bars
from secateur.commands.options import Options, Running


@generated
def export(
    folder: PrunedFolder,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder, or the .gguf file, to write.", show_default=False)
    ],
    running: Annotated[Running, Only(("overwrite",))],
    format: Annotated[
        str, typer.Option(help="gguf: one file for llama.cpp; hf: a folder whose config spells every block's width.")
    ] = "gguf",
    type_: Annotated[
        str, typer.Option("--type", help="Type of the tensors in a GGUF file: f32, f16, bf16, q8_0, q4_0.")
    ] = (Options.type),
) -> None:
    """Convert a pruned model in DIR to another format.

    Example: secateur export ./SmolLM2-pruned SmolLM2-pruned.gguf --type q8_0
    """
    if format not in ("gguf", "hf"):
        raise SecateurError(f"format is '{format}'; it must be gguf or hf")
    if format == "hf" and type_ != Options.type:
        raise SecateurError(f"type {type_} is of a GGUF file: leave --type out, or take --format gguf")
    bars = Bars()
    with bars.busy("Loading torch and transformers"):
        from secateur.write.export import export as run

    done = run(folder, out, format=cast("Any", format), type=type_, overwrite=running.overwrite, watcher=bars)
    typer.echo(f"{done.bytes / 1e6:,.2f} MB of weights, computed by {done.architecture}. Written to {done.path}")
