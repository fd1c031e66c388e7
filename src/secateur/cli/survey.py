"""`secateur survey`: what each module costs at each width, as a file and a page."""

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.base.errors import SecateurError
from secateur.cli.generate import Only, expand_options
from secateur.cli.terminal import Bars, print_result
from secateur.cli.values import Model
from secateur.commands.options import OUTPUT, SURVEYED, Options, RunOptions
from secateur.criteria.choice import parse_choice


def _by_score(values: dict[str, Any]) -> None:
    """Refuse criteria that need an option which a survey does not have."""
    if parse_choice(values["criterion"]).preselection is not None:
        raise SecateurError(
            "a survey orders units by a score: take another criterion; its page shows how alike heads are in any case"
        )


@expand_options
def survey(
    model: Model,
    options: Annotated[Options, Only(SURVEYED, _by_score)],
    run_options: Annotated[
        RunOptions, Only(("device", "memory", "revision", "family", "trust_remote_code", "overwrite", "restart"))
    ],
    out: Annotated[
        Path, typer.Option(help="Folder to write; it appears whole or not at all.", rich_help_panel=OUTPUT)
    ] = Path("survey"),
) -> None:
    """Measure what each module of MODEL costs at each width: survey.json for prune, and survey.html to look at.

    Example: secateur survey ./SmolLM2-135M --out survey --calibration text.txt
    """
    bars = Bars()
    with bars.loading():
        from secateur.commands.survey import survey_page
        from secateur.report.tables import survey_table

    found = survey_page(model, out, options, run_options, watcher=bars)
    print_result(found, *survey_table(found, out), bars)
