"""The third step of `prune`: what each width of each module would cost."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from secateur.criteria.registry import Criteria
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.model.rows import Rows
from secateur.plan.problem import Plan, SimilarHeads
from secateur.plan.similar_heads import find_similar_heads, similar_plan
from secateur.steps.open_model import OpenRun
from secateur.steps.survey_file import read_survey, split_survey_rows, survey_key
from secateur.survey.curves import Survey, save_survey
from secateur.survey.head_distances import head_distances
from secateur.survey.survey import survey
from secateur.text.draw import CalibrationRows


@dataclass(frozen=True)
class Findings:
    """Measurements of the dense model from which the plan is made."""

    survey: Survey | None = None
    """Error curves and costs of all widths; None if only one plan meets the request."""
    similar_heads: SimilarHeads | None = None
    """Heads that are removed before all others; None unless the criterion compares heads."""
    plan: Plan | None = None
    """Plan that removes similar heads and nothing else; None if other units are removed too."""


def survey_model(run: OpenRun, rows: CalibrationRows) -> Findings:
    """Return the survey of the model, read from the survey file if there is one and measured otherwise.

    A new survey is written to the survey file that the run names. If the criterion compares heads, similar heads are
    found first.

    Raises:
        SecateurError: A threshold removes no head or too many; or the survey file is of another model, other rows or
            other options.
    """
    findings = _compare_heads(run, rows.selection)
    if not run.request.needs_survey:
        return findings
    return replace(findings, survey=_survey(run, rows, findings.similar_heads))


def _compare_heads(run: OpenRun, text: Tensor) -> Findings:
    """Return the similar heads of the dense model on calibration rows (rows x length), if the criterion asks for them.

    Raises:
        SecateurError: No heads are similar, or all but one head of every block are.
    """
    choice, given, problem = run.options.parsed_criterion, run.request.plan_from_file, run.request.problem
    if not choice.compares_heads or (given is not None and given.lists_units):
        return Findings()
    assert run.options.tau is not None
    distances = head_distances(run.stream, text, blocks=problem.pruned_blocks, watcher=run.watcher)
    similar, plan = find_similar_heads(distances, run.options.tau), None
    if choice.only_compares_heads:
        similar, plan = similar_plan(problem, similar)
    described = similar.describe()
    run.watcher.note(f"{described[0].upper()}{described[1:]}")
    return Findings(similar_heads=similar, plan=plan)


def _survey(run: OpenRun, rows: CalibrationRows, similar: SimilarHeads | None) -> Survey:
    """Return the survey of the survey file; without such a file, measure and save it."""
    file, key, broadcast = run.run_options.survey, survey_key(run, rows.selection), run.processes.broadcast
    if file is not None and broadcast(file.exists):
        return Survey.of(broadcast(lambda: asdict(read_survey(run, file, key))))
    measured = Survey.of(run.services.saved_result("survey", lambda: _measure(run, rows, similar)))
    measured = replace(measured, settings=key)
    if file is not None and run.processes.is_first:
        save_survey(measured, file)
    return measured


def _measure(run: OpenRun, rows: CalibrationRows, similar: SimilarHeads | None) -> dict[str, Any]:
    """Measure the error curves and costs of the blocks to prune, as JSON holds them."""
    curve_rows, probe_rows = split_survey_rows(rows.selection)
    fitted = Rows.of(curve_rows)
    if rows.random is not None:
        fitted = fitted.with_choice_rows(Rows.of(rows.random))
    criteria = run.criteria("survey", fitted, similar, blocks=run.request.block_range)
    return asdict(survey_rows(run, fitted, probe_rows, criteria, PassCheckpoint(run.services, "survey")))


def survey_rows(run: OpenRun, rows: Rows, probe_rows: Tensor, criteria: Criteria, checkpoint: PassCheckpoint) -> Survey:
    """Return the survey of the blocks to prune, with error curves on some rows and probes on others."""
    return survey(
        run.stream,
        rows,
        probe_rows=probe_rows,
        blocks=run.request.block_range,
        kinds=run.request.problem.kinds,
        criterion=criteria,
        ridge=run.options.ridge,
        seed=run.options.seed,
        checkpoint=checkpoint,
    )
