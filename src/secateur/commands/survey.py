"""`survey`: the cost of each width of a model, as a file that `prune` reads and as a page to look at."""

import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from secateur.base.errors import SecateurError
from secateur.base.files import existing_path
from secateur.base.options import changed_options, cli_name
from secateur.base.output import Output, json_kind
from secateur.base.progress import Watcher
from secateur.base.services import Services
from secateur.plan.meters import active_meter, byte_meter, cache_meter
from secateur.plan.plan import plan as solve
from secateur.plan.problem import Plan, PlanProblem
from secateur.plan.reach import check_reachable
from secateur.report.summary import SurveySummary
from secateur.report.survey_page import Distances, page_data, render
from secateur.steps.draw_rows import draw_rows
from secateur.steps.open_model import OpenRun, open_model
from secateur.steps.options import SURVEYED, Options, RunOptions
from secateur.steps.resume import resumable, retry_in_smaller_batches
from secateur.steps.survey_model import split_survey_rows, survey_model
from secateur.survey.curves import Survey, is_survey, save_survey
from secateur.survey.head_distances import head_distances
from secateur.text.draw import CalibrationRows

FILE, PAGE = "survey.json", "survey.html"
SURVEYED_FOLDER = json_kind("a folder that secateur survey wrote", is_survey, FILE, (FILE, PAGE))
SHARES = tuple(permille / 1000 for permille in range(100, 600, 25))
"""Sparsities for which the page shows a plan."""
ANY_SHARE = 1e-3
"""Sparsity with which the model is opened: small, so that no model is refused. The survey does not depend on it."""
SIMILARITY_ROWS = 16
"""Number of calibration rows on which heads are compared, as in the paper."""


def survey_page(
    model: str | Path,
    out: Path,
    options: Options,
    run_options: RunOptions | None = None,
    *,
    watcher: Watcher | None = None,
) -> SurveySummary:
    """Survey a model, and write the survey as a file and as a page.

    A stopped run leaves its state next to `out`; the same call resumes it. Processes that a launcher such as torchrun
    starts share the work.

    Args:
        model: A folder, a .gguf file or a Hugging Face Hub id.
        out: Folder for `survey.json` and `survey.html`. It appears once it is complete.
        options: Options that a survey depends on; the others keep their defaults.
        run_options: Options that do not change the result, such as the device.
        watcher: Receives progress and notes.

    Returns:
        The plans at several sparsities, for the table.

    Raises:
        SecateurError: The model or an option is wrong. Such errors are raised before the survey begins.
    """
    run_options = run_options or RunOptions()
    folder = Output(
        out,
        overwrite=run_options.overwrite,
        source=existing_path(model),
        kind=SURVEYED_FOLDER,
    )
    services = Services.join(watcher)
    if services.processes.is_first:
        folder.check()

    def make_survey(services: Services) -> SurveySummary:
        run = open_model(model, replace(options, sparsity=ANY_SHARE), run_options, services=services)
        with resumable(run, out, "survey") as run:
            return _survey_and_write(run, model, out, folder)

    return retry_in_smaller_batches(services, make_survey)


def _survey_and_write(run: OpenRun, model: str | Path, out: Path, folder: Output) -> SurveySummary:
    """Survey the model, write the file and the page, and return the figures."""
    rows = draw_rows(run, resample=False)
    survey = survey_model(run, rows).survey
    assert survey is not None
    plans = _plans(run.request.problem, survey, run.watcher.track(SHARES, "Plan"))
    distances = _distances(run, rows) if "heads" in run.options.modules else None
    meter, checkpoint, blocks = run.request.problem.parameters, run.stream.checkpoint, run.stream.blocks
    # The default of --sparsity, or the nearest sparsity that the model can reach.
    share = min(plans, key=lambda one: abs(one - 0.25), default=0.25)
    line = _prune_command(run, model, share, out / FILE)
    facts = {
        "model": checkpoint.source,
        "family": checkpoint.config.model_type,
        "parameters": int(meter.dense),
        "probe_tokens": split_survey_rows(rows.selection)[1].numel(),
        "line": line,
        "vocabulary": None if run.vocabulary is None else run.vocabulary.describe(),
        "unreached": next((share for share in SHARES if share not in plans), None),
    }
    if run.processes.is_first:
        sizes = {share: _sizes(run, plan) for share, plan in plans.items()}
        page = render(page_data(survey, blocks, plans, facts=facts, distances=distances, sizes=sizes))
        with folder as partial:
            save_survey(survey, partial / FILE)
            (partial / PAGE).write_text(page, encoding="utf-8")
    # A script may read the survey next, in any process.
    run.processes.wait()
    parameters = {share: meter.total(plan.widths) for share, plan in plans.items()}
    return SurveySummary(tuple(block.width for block in blocks), plans, parameters, line)


def _sizes(run: OpenRun, plan: Plan) -> dict[str, str]:
    """Return bytes, cache and active parameters of the model after a plan, as text by name."""
    stream, dtype = run.stream, run.dtype
    meters = {
        "weights": byte_meter(stream, dtype),
        "KV cache": cache_meter(stream, dtype),
        "used per token": active_meter(stream),
    }
    values = {name: meter.format_value(meter.total(plan.widths)) for name, meter in meters.items()}
    # Without experts, all parameters are active.
    if not any(module.experts_per_token for block in stream.blocks for module in block.modules):
        del values["used per token"]
    return values


def _distances(run: OpenRun, rows: CalibrationRows) -> Distances | None:
    """Return the distances between the heads of each block; None if the model does not show its attention weights."""
    few, blocks = rows.selection[:SIMILARITY_ROWS], run.request.problem.pruned_blocks
    try:
        distances = head_distances(run.stream, few, blocks=blocks, watcher=run.watcher)
    except SecateurError as error:
        run.watcher.note(f"The page will not show which heads are similar: {error}")
        return None
    return {index: matrix.tolist() for index, matrix in distances.items()}


def _plans(problem: PlanProblem, survey: Survey, shares: Iterable[float]) -> dict[float, Plan]:
    """Return the plan for each sparsity that the model can reach."""
    plans: dict[float, Plan] = {}
    for share in shares:
        one = replace(problem, target=share)
        try:
            check_reachable(one)
        except SecateurError:
            continue
        plans[share] = solve(one, survey=survey)
    return plans


def _prune_command(run: OpenRun, model: str | Path, share: float, file: Path) -> str:
    """Return the command that prunes from a survey, with every option that the survey depends on."""
    words = ["secateur", "prune", str(model), "OUT", "--sparsity", f"{share:g}", "--survey", str(file)]
    for name, value in changed_options(run.options, SURVEYED).items():
        words += [f"--{cli_name(name)}", value]
    run_options = run.run_options
    words += [] if run_options.revision is None else ["--revision", run_options.revision]
    words += [] if run_options.family is None else ["--family", str(run_options.family)]
    words += ["--trust-remote-code"] * run_options.trust_remote_code
    return shlex.join(words)
