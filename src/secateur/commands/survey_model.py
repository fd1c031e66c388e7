"""The third step of `prune`: what each width of each module would cost."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from secateur.commands.open_model import OpenRun
from secateur.commands.survey_file import read_survey, split_survey_rows, survey_key
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.model.rows import Rows
from secateur.plan.problem import FirstHeads, Plan
from secateur.survey.curves import Survey, save_survey
from secateur.survey.survey import survey
from secateur.text.draw import CalibrationRows


@dataclass(frozen=True)
class Findings:
    """Measurements of the dense model from which the plan is made."""

    survey: Survey | None = None
    """Error curves and costs of all widths; None if only one plan meets the request."""
    first_heads: FirstHeads | None = None
    """Heads that are removed before all others; None unless the criterion selects such heads."""
    plan: Plan | None = None
    """Plan that removes exactly the heads in `first_heads`; None unless the criterion removes nothing else."""


def survey_model(run: OpenRun, rows: CalibrationRows) -> Findings:
    """Return the survey of the model, read from the survey file if there is one and measured otherwise.

    A new survey is written to the survey file that the run names. If the criterion selects heads that are removed
    before all others, they are found first.

    Raises:
        SecateurError: A threshold removes no head or too many; or the survey file is of another model, other rows or
            other options.
    """
    findings = _first_heads(run, rows.selection)
    return replace(findings, survey=_survey(run, rows, findings.first_heads)) if run.request.needs_survey else findings


def _first_heads(run: OpenRun, text: Tensor) -> Findings:
    """Return the heads that are removed before all others, if the criterion selects such heads."""
    preselection, plan = run.options.preselection, run.request.plan_from_file
    if preselection is None or (plan is not None and plan.lists_units):
        return Findings()
    found = preselection.find(run.stream, text, run.request.problem, run.watcher)
    described = found.first_heads.describe()
    run.watcher.note(f"{described[0].upper()}{described[1:]}")
    return Findings(first_heads=found.first_heads, plan=found.plan)


def _survey(run: OpenRun, rows: CalibrationRows, first: FirstHeads | None) -> Survey:
    """Return the survey of the survey file; without such a file, measure and save it."""
    file, key, broadcast = run.run_options.survey, survey_key(run, rows.selection), run.processes.broadcast
    if file is not None and broadcast(file.exists):
        return Survey.of(broadcast(lambda: asdict(read_survey(run, file, key))))
    measured = Survey.of(run.services.saved_result("survey", lambda: _measure(run, rows, first)))
    measured = replace(measured, settings=key)
    if file is not None and run.processes.is_first:
        save_survey(measured, file)
    return measured


def _measure(run: OpenRun, rows: CalibrationRows, first: FirstHeads | None) -> dict[str, Any]:
    """Measure the error curves and costs of the blocks to prune, as JSON holds them."""
    curve_rows, probe_rows = split_survey_rows(rows.selection)
    fitted = Rows.of(curve_rows)
    if rows.random is not None:
        fitted = fitted.with_choice_rows(Rows.of(rows.random))
    blocks = run.request.block_range
    result = survey(
        run.stream,
        fitted,
        probe_rows=probe_rows,
        blocks=blocks,
        kinds=run.request.problem.kinds,
        criterion=run.criteria("survey", fitted, first, blocks=blocks),
        ridge=run.options.ridge,
        seed=run.options.seed,
        checkpoint=PassCheckpoint(run.services, "survey"),
    )
    return asdict(result)
