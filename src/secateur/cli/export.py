"""`secateur export`: a pruned folder as a GGUF file."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.generate import Only, expand_options
from secateur.cli.terminal import Bars, print_result
from secateur.cli.values import PrunedFolder
from secateur.commands.options import Options, RunOptions


@expand_options
def export(
    folder: PrunedFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .gguf file to write.", show_default=False)],
    run_options: Annotated[RunOptions, Only(("overwrite",))],
    type_: Annotated[
        str, typer.Option("--type", help="Type of the tensors: f32, f16, bf16, q8_0, q4_0.")
    ] = Options.type,
) -> None:
    """Convert a pruned model in DIR to one file for llama.cpp.

    Example: secateur export ./SmolLM2-pruned SmolLM2-pruned.gguf --type q8_0
    """
    bars = Bars()
    with bars.loading():
        from secateur.formats.gguf_export import export as run

    done = run(folder, out, type=type_, overwrite=run_options.overwrite, watcher=bars)
    line = f"{done.bytes / 1e6:,.2f} MB of weights, computed by {done.architecture}. Written to {done.path}"
    print_result(done, None, [line])
