"""`secateur sizes`: prune to several sizes from one survey."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from secateur.base.errors import SecateurError
from secateur.base.names import FORMATS
from secateur.cli.bars import Bars
from secateur.cli.generate import WHAT_TO_MEASURE, Model, Only, ScoredTokens, expand_options, fraction, other_options
from secateur.cli.terminal import print_result
from secateur.steps.options import TARGET, WIDTHS, Options, RunOptions

ONE_SIZE = ("sparsity", "target", "plan")
"""Options that set one size."""
FOLDERS = {name: one for name, one in FORMATS.items() if one.suffix is None}
TEXTS = {
    "format": {"help": f"Format of the models. {'; '.join(f'{name}: {one.help}' for name, one in FOLDERS.items())}."}
}

OWN_SURVEY = {"survey": {"default_text": "survey.json in the folder of --out"}}


@expand_options
def sizes(
    model: Model,
    options: Annotated[Options, Only(other_options(Options, *ONE_SIZE, "type"), texts=TEXTS)],
    run_options: Annotated[RunOptions, Only(other_options(RunOptions, "dry_run", "push_to_hub"), texts=OWN_SURVEY)],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the models, one for each size, and for the table and the plot.", show_default=False
        ),
    ],
    sparsities: Annotated[
        str,
        typer.Option(
            help="Fractions of the blocks' parameters to remove, one model for each, separated by commas.",
            rich_help_panel=TARGET,
        ),
    ] = "0.1,0.2,0.3,0.5",
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure the perplexity of this text at each size, in rows of --length tokens, for the table and the "
            "plot. May be given several times.",
            rich_help_panel=WHAT_TO_MEASURE,
            show_default="none: no plot",
        ),
    ] = None,
    tokens: ScoredTokens = 8192,
) -> None:
    """Prune MODEL to several sizes, and plot perplexity against size. One survey serves all sizes.

    Example: secateur sizes ./SmolLM2-135M --out sizes --sparsities .1,.25,.5 --calibration a.txt --perplexity b.txt
    """
    try:
        fractions = sorted(fraction(part) for part in sparsities.split(","))
    except ValueError:
        example = "write fractions separated by commas, for example .1,.25,.5"
        raise SecateurError(f"--sparsities is '{sparsities}'; {example}") from None
    if options.widths not in WIDTHS:
        raise SecateurError(f"widths is '{options.widths}'; for several sizes it must be one of {', '.join(WIDTHS)}")
    if options.output_format.suffix is not None:
        raise SecateurError("sizes writes folders: use --format hf, then run secateur export on each")
    each = [replace(options, sparsity=one) for one in fractions]
    bars = Bars()
    with bars.loading():
        from secateur.commands.sizes import sizes as run
        from secateur.report.tables import sizes_table

    found = run(model, out, each, run_options, texts=perplexity or [], tokens=tokens or None, watcher=bars)
    print_result(found, *sizes_table(found, out, options.length), bars.times())
