"""`secateur plan`: choose or check the width of every block."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.base.options import option_specs
from secateur.cli.bars import Bars
from secateur.cli.generate import Model, Only, expand_options, other_options
from secateur.cli.terminal import print_result
from secateur.steps.options import OUTPUT, Options, RunOptions

FITTED = tuple(name for name, one in option_specs(Options).items() if one.fit_only)
"""Options that change the fitted weights only, not the plan."""
WRITTEN = ("dry_run", "push_to_hub")
"""Options about the model that `prune` writes."""


@expand_options
def plan(
    model: Model,
    options: Annotated[Options, Only(other_options(Options, *FITTED), FITTED)],
    run_options: Annotated[RunOptions, Only(other_options(RunOptions, *WRITTEN), WRITTEN)],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the plan to this JSON file, which you can edit and pass to secateur prune --plan.",
            rich_help_panel=OUTPUT,
            show_default="none",
        ),
    ] = None,
) -> None:
    """Choose the width of every block of MODEL, or check the widths in --plan, and print them. No model is written.

    Example: secateur plan ./SmolLM2-135M --target params=100M --calibration text.txt --out plan.json
    """
    bars = Bars()
    with bars.loading():
        from secateur.commands.plan import propose
        from secateur.report.tables import plan_table

    found = propose(model, options, run_options, out=out, watcher=bars)
    print_result(found, *plan_table(found, out))
