"""The fourth step of `prune`: the width of every module."""

from dataclasses import replace

from secateur.base.words import joined
from secateur.commands.fit_blocks import perplexity_ratio, plan_key
from secateur.commands.open_model import OpenRun
from secateur.commands.request import check_plan
from secateur.commands.result import dissimilar_experts_note
from secateur.commands.survey_model import Findings
from secateur.model.axes import AxisKind, Width, axis_kinds, present
from secateur.plan.plan import plan as solve
from secateur.plan.problem import Plan
from secateur.plan.search import smallest_within
from secateur.plan.target import Target
from secateur.report.summary import pruned_part
from secateur.text.draw import CalibrationRows


def plan_widths(run: OpenRun, rows: CalibrationRows, findings: Findings) -> Plan:
    """Return the plan that meets the target at the lowest estimated loss, or the plan of a file.

    Raises:
        SecateurError: No plan meets the target.
    """
    plan = replace(_plan(run, rows, findings), first_heads=findings.first_heads)
    run.watcher.note(_description(run, plan))
    if findings.survey is not None:
        warning = dissimilar_experts_note(run.stream.blocks, findings.survey.curves, plan)
        if warning is not None:
            run.watcher.note(warning)
    return plan


def _plan(run: OpenRun, rows: CalibrationRows, findings: Findings) -> Plan:
    """Return the plan of a file, or else a solved plan that the output format can hold."""
    if run.request.plan_from_file is not None:
        return run.request.plan_from_file
    return check_plan(run.request.format, findings.plan or _solved(run, rows, findings))


def _solved(run: OpenRun, rows: CalibrationRows, findings: Findings) -> Plan:
    """Solve for the widths; for a target of perplexity, prune to several sizes and measure each."""
    options, problem, survey = run.options, run.request.problem, findings.survey
    if not options.targets_perplexity:
        return solve(problem, options.widths, survey)
    assert survey is not None
    assert isinstance(problem.target, Target)

    def measured(plan: Plan) -> float:
        plan = check_plan(run.request.format, replace(plan, first_heads=findings.first_heads))
        return float(run.services.saved_result(f"trial-{plan_key(plan)}", lambda: perplexity_ratio(run, rows, plan)))

    return smallest_within(problem, options.widths, survey, problem.target.value, measured)


def _description(run: OpenRun, plan: Plan) -> str:
    """Return one sentence about the widths of a plan, its size and its estimated loss."""
    dense, kept = [run.stream.blocks[index].width for index in plan.widths], list(plan.widths.values())
    loss = "" if plan.cost is None else f"; estimated loss increase: {plan.cost:.2f} nats per token"
    if plan.uniform:
        width, full = max(zip(kept, dense, strict=True), key=lambda pair: len(pair[1]))
        parts = [f"{width[name]:,} of {number:,} {axis_kinds()[name].label}" for name, number in full.items()]
        units = f"{joined(parts)} in every block"
    else:
        units = joined([_kept_units(kind, kept, dense) for kind in present(dense)])
    return f"Keeping {units}. Removing {plan.sparsity:.1%} of {pruned_part(run.options.blocks)}{loss}"


def _kept_units(kind: AxisKind, kept: list[Width], dense: list[Width]) -> str:
    """Return how many units along an axis a plan keeps, in all blocks and in the narrowest and widest block."""
    counts = [kind.count(width) for width in kept if kind.name in width]
    total, least, most = sum(map(kind.count, dense)), min(counts), max(counts)
    each = f"{least:,} to {most:,}" if least < most else f"{most:,}"
    return f"{sum(counts):,} of {total:,} {kind.total} ({each} per block)"
