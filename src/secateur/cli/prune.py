"""`secateur prune`: a smaller checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import panels, parameters
from secateur.cli.terminal import Bars, show
from secateur.cli.values import check_apart, check_survey, parse_kinds
from secateur.commands.options import Options


def prune(
    model: parameters.Model,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The folder or .gguf file to write; it appears whole or not at all.", show_default=False
        ),
    ],
    sparsity: parameters.Sparsity = None,
    target: parameters.Target = None,
    plan: Annotated[
        str | None,
        panels.target(
            help="In place of both, a file with each block's width, as secateur plan writes it, or with the exact "
            "heads and channels to keep, as in the secateur.json of an earlier run.",
            show_default="none",
        ),
    ] = None,
    of: parameters.Of = Options.of,
    blocks: parameters.Blocks = None,
    modules: parameters.Modules = "heads,channels",
    widths: parameters.Widths = Options.widths,
    round_: parameters.Round = Options.multiple,
    criterion: parameters.Criterion = Options.criterion,
    tau: parameters.Tau = None,
    sigma: parameters.Sigma = None,
    recovery: Annotated[
        str,
        panels.method(
            help="How the rest makes up for them. refit: the output layers, in the feed-forward with up and gate "
            "layers, aiming at what the dense model gives and so repairing earlier blocks' errors; paper (Algorithms "
            "1, 3 and 4): both layers of a module, to their dense outputs; bias (FLAP's): no weight changes, but what "
            "the removed units gave on average is added; none: weights are only cut."
        ),
    ] = Options.recovery,
    recover: Annotated[
        str, panels.method(help="When that happens: before units are chosen, after, or both.")
    ] = Options.recover,
    ridge: parameters.Ridge = Options.ridge,
    level1: parameters.Level1 = Options.level1,
    intercept: Annotated[
        bool,
        panels.method(
            "--intercept",
            help="Fit a bias in output layers that have none, where no norm lies behind them. --format hf holds it, "
            "gguf does for llama, mistral, qwen2 and phi3, stock where the family's own class has such biases. Biases "
            "that exist are fitted along in any case.",
        ),
    ] = False,
    calibration: parameters.Calibration = Options.calibration,
    samples: parameters.Samples = Options.samples,
    fits: parameters.Fits = Options.fits,
    more: parameters.More = Options.more,
    length: parameters.Length = Options.length,
    temperature: parameters.Temperature = Options.temperature,
    save_calibration: parameters.SaveCalibration = None,
    refit_calibration: Annotated[
        str | None,
        panels.calibration(
            help="Text of its own for the recovery, like --calibration: that one decides what goes, this one what the "
            "rest is fitted to.",
            show_default="that of --calibration",
        ),
    ] = None,
    refit_samples: Annotated[
        int | None,
        panels.calibration(
            help="Rows of its own for the recovery; those of --samples then only decide what goes.",
            show_default="the same rows for both",
        ),
    ] = None,
    seed: parameters.Seed = Options.seed,
    device: parameters.Device = "auto",
    revision: parameters.Revision = None,
    trust_remote_code: parameters.TrustRemoteCode = False,
    dtype: parameters.Dtype = None,
    format: parameters.Format = None,
    type_: parameters.Type = Options.type,
    survey: parameters.Survey = None,
    dry_run: Annotated[
        bool, panels.output("--dry-run", help="Print sizes, memory and time to expect; OUT is not written.")
    ] = False,
    overwrite: Annotated[
        bool, panels.output("--overwrite", help="Replace OUT where it is a model already, a folder or a .gguf file.")
    ] = False,
) -> None:
    """Prune MODEL and write a smaller checkpoint to OUT.

    Example: secateur prune ./SmolLM2-135M ./SmolLM2-pruned --sparsity 0.25 --calibration text.txt
    """
    options = Options(
        sparsity=sparsity,
        target=target,
        plan=plan,
        of=of,
        blocks=blocks,
        modules=parse_kinds(modules),
        widths=widths,
        criterion=criterion,
        tau=tau,
        sigma=sigma,
        recovery=recovery,
        recover=recover,
        ridge=ridge,
        level1=level1,
        intercept=intercept,
        calibration=calibration,
        samples=samples,
        fits=fits,
        more=more,
        length=length,
        temperature=temperature,
        refit_calibration=refit_calibration,
        refit_samples=refit_samples,
        seed=seed,
        multiple=round_,
        dtype=dtype,
        format=format,
        type=type_,
    )
    check_apart(out, survey=survey, calibration=save_calibration)
    check_survey(survey)
    bars = Bars()
    with bars.busy("Loading torch and transformers"):
        from secateur.commands.prune import prune as run
        from secateur.report.tables import prune_table

    summary = run(
        model,
        out,
        options=options,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
        overwrite=overwrite,
        survey_file=survey,
        save_calibration=save_calibration,
        watcher=bars,
    )
    show(*prune_table(summary, out))
