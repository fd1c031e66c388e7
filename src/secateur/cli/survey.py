"""`secateur survey`: measure what each width of each module costs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.base.errors import SecateurError
from secateur.cli.bars import Bars
from secateur.cli.generate import Model, Only, expand_options, other_options
from secateur.cli.processes import ProcessOptions, run_in_processes
from secateur.cli.terminal import print_result
from secateur.criteria.choice import parse_choice
from secateur.steps.options import OUTPUT, SURVEYED, Options, RunOptions


def _refuse_similarity(values: dict[str, Any]) -> None:
    """Raise `SecateurError` for `similarity`, which gives units no score."""
    if parse_choice(values["criterion"]).compares_heads:
        raise SecateurError(
            "a survey needs a criterion that gives every unit a score: choose another one; survey.html compares "
            "heads in pairs with any criterion"
        )


@expand_options
def survey(
    model: Model,
    options: Annotated[Options, Only(SURVEYED, other_options(Options, *SURVEYED), check=_refuse_similarity)],
    run_options: Annotated[
        RunOptions, Only(("device", "memory", "revision", "family", "trust_remote_code", "overwrite", "restart"))
    ],
    process_options: ProcessOptions,
    out: Annotated[
        Path, typer.Option(help="Folder to write; it appears only once it is complete.", rich_help_panel=OUTPUT)
    ] = Path("survey"),
) -> None:
    """Measure the error of each module of MODEL at each width. Writes survey.json, and survey.html for a browser.

    Example: secateur survey ./SmolLM2-135M --out survey --calibration text.txt
    """
    run_in_processes(process_options)
    bars = Bars()
    with bars.loading():
        from secateur.commands.survey import survey_page
        from secateur.report.tables import survey_table

    found = survey_page(model, out, options, run_options, watcher=bars)
    print_result(found, *survey_table(found, out), bars.times())
