"""`secateur sizes`: several sizes from one survey, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.base.errors import SecateurError
from secateur.cli import panels, parameters
from secateur.cli.terminal import Bars, show
from secateur.cli.values import check_survey, parse_shares
from secateur.commands.options import WIDTHS, Options


def sizes(
    model: parameters.Model,
    out: Annotated[
        Path, typer.Option(help="The folder that gets a model for each size, a table and a plot.", show_default=False)
    ],
    sparsities: Annotated[
        str, panels.target(help="Shares of the parameters to remove, with commas.")
    ] = "0.1,0.2,0.3,0.5",
    of: parameters.Of = Options.of,
    widths: Annotated[
        str,
        panels.target(
            help="adaptive: each module the width at which the whole model loses least; uniform: one width for all "
            "blocks, which the stock class holds."
        ),
    ] = Options.widths,
    round_: parameters.Round = Options.multiple,
    calibration: parameters.Calibration = Options.calibration,
    samples: parameters.Samples = Options.samples,
    level1: parameters.Level1 = Options.level1,
    fits: parameters.Fits = Options.fits,
    more: parameters.More = Options.more,
    length: parameters.Length = Options.length,
    temperature: parameters.Temperature = Options.temperature,
    seed: parameters.Seed = Options.seed,
    perplexity: Annotated[
        list[str] | None,
        panels.measured(
            help="Text to score each size on, for the table and the plot; may be given several times.",
            show_default="none: no plot",
        ),
    ] = None,
    tokens: Annotated[int, panels.measured(help="Tokens of each text; 0 for all.")] = 8192,
    device: parameters.Device = "auto",
    revision: parameters.Revision = None,
    trust_remote_code: parameters.TrustRemoteCode = False,
    format: Annotated[str | None, panels.output(help="hf or stock; see secateur prune.")] = None,
    dtype: parameters.Dtype = None,
    survey: Annotated[
        Path | None,
        panels.output(
            help="Keep the survey in this file: read if it is there, written otherwise.", show_default="OUT/survey.json"
        ),
    ] = None,
    overwrite: Annotated[bool, panels.output("--overwrite", help="Replace models that are there.")] = False,
) -> None:
    """Prune MODEL to several sizes from one survey, and plot perplexity against size.

    Example: secateur sizes ./SmolLM2-135M --out sizes --sparsities .1,.25,.5 --calibration a.txt --perplexity b.txt
    """
    shares = parse_shares(sparsities)
    check_survey(survey)
    if tokens < 0:
        raise SecateurError(f"tokens is {tokens}; it must be positive, or 0 for all")
    if widths not in WIDTHS:
        raise SecateurError(f"widths is '{widths}'; for several sizes it must be one of {', '.join(WIDTHS)}")
    if format == "gguf":
        raise SecateurError("sizes writes folders; take --format hf, then secateur export each")
    options = [
        Options(
            sparsity=share,
            of=of,
            widths=widths,
            multiple=round_,
            calibration=calibration,
            samples=samples,
            level1=level1,
            fits=fits,
            more=more,
            length=length,
            temperature=temperature,
            seed=seed,
            format=format,
            dtype=dtype,
        )
        for share in shares
    ]
    bars = Bars()
    with bars.busy("Loading torch and transformers"):
        from secateur.commands.sizes import sizes as run
        from secateur.report.tables import sizes_table

    results = run(
        model,
        out,
        options,
        texts=perplexity or [],
        tokens=tokens or None,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        survey_file=survey,
        overwrite=overwrite,
        watcher=bars,
    )
    show(*sizes_table(results, out))
