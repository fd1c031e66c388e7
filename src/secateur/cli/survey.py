"""`secateur survey`: what each module costs at each width, as a file and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from secateur.base.errors import SecateurError
from secateur.cli import panels, parameters
from secateur.cli.terminal import Bars, show
from secateur.cli.values import parse_kinds
from secateur.commands.options import Options


def survey(
    model: parameters.Model,
    out: Annotated[Path, panels.output(help="The folder to write; it appears whole or not at all.")] = Path("survey"),
    blocks: parameters.Blocks = None,
    modules: parameters.Modules = "heads,channels",
    criterion: Annotated[
        str, panels.method(help="What orders the units: any of secateur prune's but similarity; or a pair of them.")
    ] = Options.criterion,
    ridge: parameters.Ridge = Options.ridge,
    calibration: parameters.Calibration = Options.calibration,
    samples: parameters.Samples = Options.samples,
    length: parameters.Length = Options.length,
    seed: parameters.Seed = Options.seed,
    device: parameters.Device = "auto",
    revision: parameters.Revision = None,
    trust_remote_code: parameters.TrustRemoteCode = False,
    overwrite: Annotated[bool, panels.output("--overwrite", help="Replace a survey that is there.")] = False,
) -> None:
    """Measure what each module of MODEL costs at each width: survey.json for prune, and survey.html to look at.

    Example: secateur survey ./SmolLM2-135M --out survey --calibration text.txt
    """
    if "similarity" in criterion:
        raise SecateurError(
            "a survey orders units by a score: take another criterion; its page shows how alike heads are in any case"
        )
    options = Options(
        blocks=blocks,
        modules=parse_kinds(modules),
        criterion=criterion,
        ridge=ridge,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
    )
    bars = Bars()
    with bars.busy("Loading torch and transformers"):
        from secateur.commands.survey import survey_page
        from secateur.report.tables import survey_table

    found = survey_page(
        model,
        out,
        options,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        watcher=bars,
    )
    show(*survey_table(found, out))
