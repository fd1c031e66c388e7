"""`secateur export`: convert a pruned folder to a GGUF file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.bars import Bars
from secateur.cli.generate import Only, PrunedFolder, expand_options
from secateur.cli.terminal import print_result
from secateur.steps.options import Options, RunOptions


@expand_options
def export(
    folder: PrunedFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .gguf file to write.", show_default=False)],
    run_options: Annotated[RunOptions, Only(("overwrite", "device"))],
    type_: Annotated[
        str,
        typer.Option(
            "--type",
            help="Data type of the tensors: f16, f32, bf16, q8_0 or q4_0. With llama.cpp's library (pip install "
            "'secateur\\[llama]'), also q2_k to q6_k, q4_k_m, iq2_xxs, iq4_xs and others of its types. If the "
            "original model was a .gguf file, as-input gives each tensor the type that it had there.",
        ),
    ] = Options.type,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text as for prune, on which importances of weights are measured. llama.cpp's library rounds more "
            "exactly with them, and needs them for most types below three bits.",
            show_default="none",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(help="File of llama.cpp's llama-imatrix, in place of --calibration.", show_default="none"),
    ] = None,
) -> None:
    """Convert a pruned model to one GGUF file for llama.cpp.

    Example: secateur export ./SmolLM2-pruned SmolLM2-pruned.gguf --type q8_0
    """
    bars = Bars()
    with bars.loading():
        from secateur.gguf.export import export as run

    importances: dict[str, Any] = {"calibration": calibration, "imatrix": imatrix, "device": run_options.device}
    done = run(folder, out, type=type_, overwrite=run_options.overwrite, watcher=bars, **importances)
    line = f"Written to {out}: {done.bytes / 1e6:,.2f} MB of weights, llama.cpp architecture {done.architecture}"
    print_result(done, None, [line])
