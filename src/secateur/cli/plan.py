"""`secateur plan`: widths block by block, chosen or checked."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.base.options import option_specs
from secateur.base.output import Output
from secateur.cli.generate import Without, expand_options
from secateur.cli.terminal import Bars, print_result
from secateur.cli.values import Model, check_survey_path
from secateur.commands.options import OUTPUT, Options, RunOptions

FITTED = tuple(name for name, one in option_specs(Options).items() if one.fit_only)
"""Options of which nothing shows before blocks are fitted."""


@expand_options
def plan(
    model: Model,
    options: Annotated[Options, Without(FITTED)],
    run_options: Annotated[RunOptions, Without(("dry_run", "push_to_hub"))],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for the plan, as JSON: edit it, then give it to secateur prune --plan.",
            rich_help_panel=OUTPUT,
            show_default="none",
        ),
    ] = None,
) -> None:
    """Choose widths for MODEL, or check those of --plan, and show them block by block; no model is written.

    Example: secateur plan ./SmolLM2-135M --target params=100M --calibration text.txt --out plan.json
    """
    check_survey_path(run_options.survey, out)
    if out is not None:
        Output(out, suffix="", overwrite=run_options.overwrite).check()
    bars = Bars()
    with bars.loading():
        from secateur.commands.plan import propose
        from secateur.report.tables import plan_table

    found = propose(model, options, run_options, out=out, watcher=bars)
    print_result(found, *plan_table(found, out))
