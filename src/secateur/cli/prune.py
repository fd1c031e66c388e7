"""`secateur prune`: write a smaller checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.bars import Bars
from secateur.cli.generate import Model, expand_options
from secateur.cli.processes import ProcessOptions, run_in_processes
from secateur.cli.terminal import print_result
from secateur.steps.options import Options, RunOptions


@expand_options
def prune(
    model: Model,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="The folder or .gguf file to write; it appears only once it is complete.",
            show_default=False,
        ),
    ],
    options: Options,
    run_options: RunOptions,
    process_options: ProcessOptions,
) -> None:
    """Prune MODEL and write a smaller checkpoint to OUT.

    Example: secateur prune ./SmolLM2-135M ./SmolLM2-pruned --sparsity 0.25 --calibration text.txt
    """
    run_in_processes(process_options)
    bars = Bars()
    with bars.loading():
        from secateur.report.tables import prune_table
        from secateur.steps.prune import prune as run

    done = run(model, out, options, run_options, watcher=bars)
    print_result(
        {"out": out, **vars(done)},
        *prune_table(done, out),
        bars.times(),
    )
