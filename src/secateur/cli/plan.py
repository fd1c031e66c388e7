"""`secateur plan`: widths block by block, chosen or checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from secateur.base.whole_file import write_whole
from secateur.cli import panels, parameters
from secateur.cli.terminal import Bars, show
from secateur.cli.values import check_apart, check_new, check_survey, parse_kinds
from secateur.commands.options import Options


def plan(
    model: parameters.Model,
    sparsity: parameters.Sparsity = None,
    target: parameters.Target = None,
    plan_: Annotated[
        str | None, panels.target("--plan", help="Check and draw this plan in place of making one.")
    ] = None,
    of: parameters.Of = Options.of,
    blocks: parameters.Blocks = None,
    modules: parameters.Modules = "heads,channels",
    widths: parameters.Widths = Options.widths,
    round_: parameters.Round = Options.multiple,
    criterion: parameters.Criterion = Options.criterion,
    tau: parameters.Tau = None,
    sigma: parameters.Sigma = None,
    ridge: parameters.Ridge = Options.ridge,
    calibration: parameters.Calibration = Options.calibration,
    samples: parameters.Samples = Options.samples,
    length: parameters.Length = Options.length,
    temperature: parameters.Temperature = Options.temperature,
    save_calibration: parameters.SaveCalibration = None,
    seed: parameters.Seed = Options.seed,
    device: parameters.Device = "auto",
    revision: parameters.Revision = None,
    trust_remote_code: parameters.TrustRemoteCode = False,
    dtype: parameters.Dtype = None,
    format: parameters.Format = None,
    type_: parameters.Type = Options.type,
    survey: parameters.Survey = None,
    out: Annotated[
        Path | None,
        panels.output(
            help="Write the plan to this JSON file: edit it, then give it to secateur prune --plan.",
            show_default="none",
        ),
    ] = None,
    overwrite: Annotated[bool, panels.output("--overwrite", help="Replace a plan that is there.")] = False,
) -> None:
    """Choose widths for MODEL, or check a plan, and show them block by block; no model is written.

    Example: secateur plan ./SmolLM2-135M --target params=100M --calibration text.txt --out plan.json
    """
    options = Options(
        sparsity=sparsity,
        target=target,
        plan=plan_,
        of=of,
        blocks=blocks,
        modules=parse_kinds(modules),
        widths=widths,
        criterion=criterion,
        tau=tau,
        sigma=sigma,
        ridge=ridge,
        calibration=calibration,
        samples=samples,
        length=length,
        temperature=temperature,
        seed=seed,
        multiple=round_,
        dtype=dtype,
        format=format,
        type=type_,
    )
    check_apart(survey=survey, calibration=save_calibration, plan=out)
    if out is not None:
        check_new(out, overwrite)
    check_survey(survey)
    bars = Bars()
    with bars.busy("Loading torch and transformers"):
        from secateur.commands.plan import propose
        from secateur.report.tables import plan_table

    proposal = propose(
        model,
        options,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        survey_file=survey,
        save_calibration=save_calibration,
        watcher=bars,
    )
    if out is not None:
        write_whole(out, json.dumps(proposal.as_dict(), indent=2) + "\n")
    show(*plan_table(proposal, out))
