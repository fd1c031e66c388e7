"""`secateur prune`: a smaller checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.arguments import Model
from secateur.cli.generate import generated
from secateur.cli.terminal import Bars, show
from secateur.cli.values import check_apart, check_survey
from secateur.commands.options import Options, Running


@generated
def prune(
    model: Model,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The folder or .gguf file to write; it appears whole or not at all.", show_default=False
        ),
    ],
    options: Options,
    running: Running,
) -> None:
    """Prune MODEL and write a smaller checkpoint to OUT.

    Example: secateur prune ./SmolLM2-135M ./SmolLM2-pruned --sparsity 0.25 --calibration text.txt
    """
    check_apart(out, survey=running.survey, calibration=running.save_calibration)
    check_survey(running.survey)
    bars = Bars()
    with bars.busy("Loading torch and transformers"):
        from secateur.commands.prune import prune as run
        from secateur.report.tables import prune_table

    show(*prune_table(run(model, out, options, running, watcher=bars), out))
