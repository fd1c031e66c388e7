"""A dry run: the sizes of the pruned model, and the time and memory that the run is expected to need at each effort.

The time is the number of operations (`costs.py`) divided by the speed of this machine (`machine_speed.py`).
"""

from dataclasses import replace

from secateur.base.errors import SecateurError
from secateur.base.memory import rss_bytes
from secateur.commands.costs import fit_work, gradient_work, resampling_work, survey_work
from secateur.commands.draw_rows import draw_rows
from secateur.commands.machine_speed import measure_speeds
from secateur.commands.open_model import OpenRun
from secateur.commands.options import EFFORTS
from secateur.commands.result import summarize
from secateur.commands.survey_file import split_survey_rows
from secateur.commands.work import Work
from secateur.criteria.registry import Criteria
from secateur.plan.meters import cache_meter, parameter_meter
from secateur.plan.plan import plan as solve
from secateur.plan.problem import Plan
from secateur.report.summary import Summary
from secateur.survey.curve_estimator import PROBED_SHARES
from secateur.text.draw import CalibrationRows
from secateur.text.self_calibration import generation_bytes
from secateur.text.sources import SELF

SLACK = 1.5
"""Expected seconds divided by the seconds that the operations take at the measured speeds."""


def estimate(run: OpenRun) -> Summary:
    """Return the sizes of the pruned model, and the expected time and memory of the run.

    Raises:
        SecateurError: Only a real run can find out how much is removed.
    """
    options = run.options
    if options.targets_perplexity:
        raise SecateurError(
            "only a real run can reach a target of perplexity, because it prunes to several sizes; leave out --dry-run"
        )
    if options.parsed_criterion.only_compares_heads:
        raise SecateurError(
            "only a real run can find the number of similar heads, because it runs the model; leave out --dry-run"
        )
    rows = draw_rows(run, dry=True)
    if run.request.needs_survey:
        run.watcher.note(
            "This plan assumes that all blocks are equally important; a real run measures the cost of each width first"
        )
    plan = run.request.plan_from_file or solve(run.request.problem, options.widths)
    with run.watcher.busy("Measuring this machine"):
        speeds = measure_speeds(run, rows.selection)
    limit = run.memory_bytes - rss_bytes()
    expected = {
        effort: (SLACK * speeds.seconds(work), min(work.resident_bytes + work.activation_bytes, limit))
        for effort, work in work_by_effort(run, rows, plan).items()
    }
    return summarize(run, rows, plan, expected)


def work_by_effort(run: OpenRun, rows: CalibrationRows, plan: Plan) -> dict[str, Work]:
    """Return the work of the whole run at each effort; only at the effort of the run if the recovery has no efforts."""
    before = [_generation(run, rows), *_before_fits(run, rows, plan.lists_units)]
    efforts = EFFORTS if run.recovery.uses_effort else (run.options.effort,)
    return {effort: Work.total([*before, *_fits(run, rows, plan, effort)]) for effort in efforts}


def _generation(run: OpenRun, rows: CalibrationRows) -> Work:
    """Return the work of generating calibration text: two operations for each parameter and token."""
    checkpoint, length = run.stream.checkpoint, run.options.length
    parts = (rows.selection, rows.selection[:0] if rows.separate_refit is None else rows.separate_refit)
    tokens = sum(part.numel() for source, part in zip(run.options.sources, parts, strict=True) if source == SELF)
    if not tokens:
        return Work()
    cache_bytes = cache_meter(run.stream, checkpoint.dtype).dense
    peak = round(generation_bytes(checkpoint, length=length, cache_bytes=cache_bytes))
    return Work(generated=2 * parameter_meter(run.stream).dense * tokens, resident_bytes=peak)


def _before_fits(run: OpenRun, rows: CalibrationRows, lists_units: bool) -> list[Work]:
    """Return the work of the survey and of the backward pass, if the run needs them."""
    parts, file = [], run.run_options.survey
    if run.request.needs_survey and not (file and file.exists()):
        curve_rows, probe_rows = split_survey_rows(rows.selection)
        blocks = run.request.block_range
        probes = max(len(run.request.problem.prunable_modules(index)) for index in blocks) * (len(PROBED_SHARES) + 1)
        parts.append(survey_work(run.stream, blocks, curve_rows.numel(), probe_rows.numel(), probes))
    if Criteria(run.options.criterion_name).needs_gradients and not lists_units:
        parts.append(gradient_work(run.stream, rows.grouped.tokens))
    return parts


def _fits(run: OpenRun, rows: CalibrationRows, plan: Plan, effort: str) -> list[Work]:
    """Return the work of the steps that depend on the effort: resampling and the fits."""
    run = replace(run, options=replace(run.options, effort=effort))
    rows = replace(rows, request=run.row_request).with_placeholders()
    fits = fit_work(run.stream, rows.grouped, plan.widths, run.recovery.input_steps)
    return [fits] if rows.resampled is None else [resampling_work(run.stream, rows.fit.numel()), fits]
