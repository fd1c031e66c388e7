"""The third step of `prune`: what each width of each module would cost, measured or read from a survey file."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.hashes import hash_rows
from secateur.criteria.registry import Criteria
from secateur.model.axes import Axis
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.model.rows import Rows
from secateur.model.structure import PrunableModule
from secateur.plan.problem import Plan, SimilarHeads
from secateur.plan.similar_heads import find_similar_heads, similar_plan
from secateur.steps.open_model import OpenRun
from secateur.survey.curves import Survey, load_survey, save_survey
from secateur.survey.head_distances import head_distances
from secateur.survey.survey import survey
from secateur.text.draw import CalibrationRows

PROBE_TOKENS = 1024
"""Tokens on which the cost of errors is measured. The probed modules are fitted to all other tokens: after a fit to few
tokens, the measured cost would come from the fit and not from the removed units."""


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
    criteria = run.criteria("survey", fitted, similar, blocks=run.request.problem.pruned_blocks)
    return asdict(survey_rows(run, fitted, probe_rows, criteria, PassCheckpoint(run.services, "survey")))


def survey_rows(run: OpenRun, rows: Rows, probe_rows: Tensor, criteria: Criteria, checkpoint: PassCheckpoint) -> Survey:
    """Return the survey of the blocks to prune, with error curves on some rows and probes on others."""
    return survey(
        run.stream,
        rows,
        probe_rows=probe_rows,
        blocks=run.request.problem.pruned_blocks,
        kinds=run.request.problem.kinds,
        criterion=criteria,
        ridge=run.options.ridge,
        seed=run.options.seed,
        checkpoint=checkpoint,
    )


def split_survey_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows for the error curves and the rows for the probes, which are the last few.

    Args:
        rows: Token ids (rows x length). A single row serves as both.
    """
    count = min(max(1, PROBE_TOKENS // rows.shape[1]), len(rows) // 2)
    return (rows[:-count], rows[-count:]) if count else (rows, rows)


def survey_key(run: OpenRun, rows: Tensor | None) -> dict[str, Any]:
    """Return everything that a survey depends on, by name; without the calibration rows if `rows` is None."""
    blocks = run.request.problem.pruned_blocks
    key: dict[str, Any] = {
        **run.stream.checkpoint.identity,
        "blocks": f"{blocks.start}:{blocks.stop}",
        "modules": ",".join(run.request.problem.kinds),
        **run.options.survey_key,
    }
    return key if rows is None else key | {"calibration": hash_rows(rows)}


def check_survey_file(run: OpenRun, rows: Tensor | None = None) -> None:
    """Check that an existing survey file is of this model, of these options and, if they are given, of these rows.

    Raises:
        SecateurError: The survey is of another model, other options or other rows.
    """
    file = run.run_options.survey
    if run.processes.is_first and file is not None and file.exists() and run.request.needs_survey:
        read_survey(run, file, survey_key(run, rows))


def read_survey(run: OpenRun, file: Path, key: dict[str, Any]) -> Survey:
    """Return the survey of a file, which must have the error curves and probes of every module to prune.

    Args:
        run: The result of `open_model`.
        file: JSON file that `save_survey` wrote.
        key: Everything that the survey depends on, from `survey_key`.

    Raises:
        SecateurError: The survey is of another model or other options, or lacks a module.
    """
    survey = load_survey(file, key)
    problem = run.request.problem
    lengths = {(curve.block, curve.kind, curve.axis): len(curve.errors) for curve in survey.curves}
    probed = {(probe.block, probe.kind) for probe in survey.probes if probe.removes_module}
    for index in run.request.problem.pruned_blocks:
        for module in problem.prunable_modules(index):
            axes = [axis for axis in module.cut_axes if axis.kind in problem.kinds]
            complete = all(lengths.get((index, module.kind, axis.name)) == _length(module, axis) for axis in axes)
            if not complete or (index, module.kind) not in probed:
                raise SecateurError(
                    f"{file}: this survey lacks widths of the {module.kind} of block {index}; name another file, or "
                    "delete this one, so that the survey is made again"
                )
    return survey


def _length(module: PrunableModule, axis: Axis) -> int:
    """Return the number of widths along an axis that have an error, the dense width included."""
    return 1 if module.locked else axis.units - axis.min_units + 1
