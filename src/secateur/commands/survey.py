"""`survey`: what each width of a model costs, as the file that `prune` reads and as a page to look at."""

import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from secateur.base.errors import SecateurError
from secateur.base.options import changed_options, cli_name
from secateur.base.output import Output
from secateur.base.progress import Watcher
from secateur.base.services import Services
from secateur.commands.draw_rows import draw_rows
from secateur.commands.open_model import OpenRun, open_model
from secateur.commands.options import SURVEYED, Options, RunOptions
from secateur.commands.resume import resumable, retry_in_smaller_batches
from secateur.commands.survey_model import survey_model
from secateur.plan.plan import check_reachable, plan
from secateur.plan.problem import Plan, PlanProblem
from secateur.report.summary import SurveySummary
from secateur.report.survey_page import Distances, page_data, render
from secateur.survey.curves import Survey, save_survey
from secateur.survey.head_distances import head_distances
from secateur.text.draw import CalibrationRows

FILE, PAGE = "survey.json", "survey.html"
SHARES = tuple(percent / 100 for percent in range(10, 65, 5))
"""For which the page shows a plan."""
ANY_SHARE = 1e-3
"""A request needs a share. The survey is the same for all, and no model is to be refused for one out of reach."""
LIKENESS_ROWS = 16
"""Calibration rows on which heads are compared: the paper's count."""


def survey_page(
    model: str | Path,
    out: Path,
    options: Options,
    run_options: RunOptions | None = None,
    *,
    watcher: Watcher | None = None,
) -> SurveySummary:
    """Survey a model and write what was found; the folder appears complete or not at all.

    Args:
        model: see `prune`.
        out: the folder for `survey.json` and `survey.html`.
        options: what a survey depends on; the rest is as for adaptive widths in the format `hf`.

    Raises:
        SecateurError: as `prune` does, before the survey begins.
    """
    run_options = run_options or RunOptions()
    folder = Output(
        out,
        overwrite=run_options.overwrite,
        source=Path(model) if Path(model).is_dir() else None,
        file_names=(FILE, PAGE),
    )
    services = Services.join(watcher)
    if services.processes.is_first:
        folder.check()

    def surveyed(services: Services) -> SurveySummary:
        run = open_model(model, replace(options, sparsity=ANY_SHARE), run_options, services=services)
        with resumable(run, out) as run:
            return _surveyed(run, model, out, folder, options, run_options)

    return retry_in_smaller_batches(services, surveyed)


def _surveyed(
    run: OpenRun, model: str | Path, out: Path, folder: Output, options: Options, run_options: RunOptions
) -> SurveySummary:
    """The survey and its page, written; see `survey_page`."""
    rows = draw_rows(run, resample=False)
    found = survey_model(run, rows).survey
    assert found is not None
    plans = _plans(run.request.problem, found, run.watcher.track(SHARES, "Plan"))
    distances = _distances(run, rows) if "heads" in options.modules else None
    counted, checkpoint = run.request.parameters, run.stream.checkpoint
    # A quarter, as `prune` takes where nothing is said, or what comes nearest.
    share = min(plans, key=lambda one: abs(one - 0.25), default=0.25)
    line = _line(model, options, share, out / FILE, run_options)
    facts = {
        "model": checkpoint.source,
        "family": checkpoint.config.model_type,
        "parameters": int(counted.dense),
        "line": line,
    }
    if run.processes.is_first:
        page = render(page_data(found, run.stream.blocks, plans, facts=facts, distances=distances))
        with folder as partial:
            save_survey(found, partial / FILE)
            (partial / PAGE).write_text(page, encoding="utf-8")
    parameters = {share: counted.total(one.widths) for share, one in plans.items()}
    return SurveySummary(tuple(block.width for block in run.stream.blocks), plans, parameters, line)


def _distances(run: OpenRun, rows: CalibrationRows) -> Distances | None:
    """How alike the heads of each surveyed block are; None where their attention cannot be watched."""
    some, chosen = rows.selection[:LIKENESS_ROWS], run.request.block_range
    try:
        found = head_distances(run.stream, some, blocks=chosen, watcher=run.watcher)
    except SecateurError as error:
        run.watcher.note(f"The page says nothing of similar heads: {error}")
        return None
    return {index: distances.tolist() for index, distances in found.items()}


def _plans(problem: PlanProblem, found: Survey, shares: Iterable[float]) -> dict[float, Plan]:
    """The plan of each share that the modules can reach."""
    plans: dict[float, Plan] = {}
    for share in shares:
        one = replace(problem, target=share)
        try:
            check_reachable(one)
        except SecateurError:
            continue
        plans[share] = plan(one, survey=found)
    return plans


def _line(model: str | Path, options: Options, share: float, file: Path, run_options: RunOptions) -> str:
    """The command that prunes from a survey: what the survey depends on must be said again."""
    words = ["secateur", "prune", str(model), "OUT", "--sparsity", f"{share:g}", "--survey", str(file)]
    for name, value in changed_options(options, SURVEYED).items():
        words += [f"--{cli_name(name)}", value]
    words += [] if run_options.revision is None else ["--revision", run_options.revision]
    words += ["--trust-remote-code"] * run_options.trust_remote_code
    return shlex.join(words)
