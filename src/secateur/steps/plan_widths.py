"""The fourth step of `prune`: the width of every module."""

from dataclasses import replace

from secateur.base.words import joined
from secateur.model.axes import AxisKind, Width, alike, axis_kinds, model_width, present
from secateur.plan.plan import plan as solve
from secateur.plan.problem import Plan
from secateur.plan.search import smallest_within
from secateur.plan.target import Target
from secateur.report.summary import each_keeps, pruned_part
from secateur.steps.fit_blocks import perplexity_ratio, plan_key
from secateur.steps.open_model import OpenRun
from secateur.steps.request import check_plan
from secateur.steps.result import dissimilar_experts_note
from secateur.steps.survey_model import Findings
from secateur.text.draw import CalibrationRows


def plan_widths(run: OpenRun, rows: CalibrationRows, findings: Findings) -> Plan:
    """Return the plan that meets the target at the lowest estimated loss, or the plan of a file.

    Raises:
        SecateurError: No plan meets the target.
    """
    plan, request = run.request.plan_from_file, run.request
    if plan is None:
        plan = check_plan(request.format, request.problem, findings.plan or _solved(run, rows, findings))
    plan = replace(plan, similar_heads=findings.similar_heads)
    run.watcher.note(_description(run, plan))
    if findings.survey is not None:
        warning = dissimilar_experts_note(run.stream.blocks, findings.survey.curves, plan)
        if warning is not None:
            run.watcher.note(warning)
    return plan


def _solved(run: OpenRun, rows: CalibrationRows, findings: Findings) -> Plan:
    """Solve for the widths; for a target of perplexity, prune to several sizes and measure each."""
    options, problem, survey = run.options, run.request.problem, findings.survey
    if not options.targets_perplexity:
        return solve(problem, options.widths, survey)
    assert survey is not None
    assert isinstance(problem.target, Target)

    def measured(plan: Plan) -> float:
        plan = check_plan(run.request.format, problem, replace(plan, similar_heads=findings.similar_heads))
        return float(run.services.saved_result(f"trial-{plan_key(plan)}", lambda: perplexity_ratio(run, rows, plan)))

    return smallest_within(problem, options.widths, survey, problem.target.value, measured)


def _description(run: OpenRun, plan: Plan) -> str:
    """Return one sentence about the widths of a plan, its size and its estimated loss."""
    # The survey refits each module that it cuts, whatever the run does.
    refit = "" if run.recovery.fits else " if weights were refitted"
    loss = "" if plan.cost is None else f"; estimated loss increase{refit}: {plan.cost:.2f} nats per token"
    dense = [block.width for block in run.stream.blocks]
    pruned = [dense[index] for index in plan.widths]
    if plan.uniform and alike(pruned):
        where, width = each_keeps(plan.widths, len(run.stream))
        full = model_width(pruned)
        parts = [f"{number:,} of {full[name]:,} {axis_kinds()[name].label}" for name, number in width.items()]
        units = f"{joined(parts)} in {where}"
    else:
        kept = [plan.widths.get(index, width) for index, width in enumerate(dense)]
        units = joined([_kept_units(kind, kept, dense) for kind in present(dense)])
    return f"Keeping {units}. Removing {plan.sparsity:.1%} of {pruned_part(run.options.blocks)}{loss}"


def _kept_units(kind: AxisKind, kept: list[Width], dense: list[Width]) -> str:
    """Return how many units along an axis a plan keeps, in all blocks and in the narrowest and widest block."""
    counts = [kind.count(width) for width in kept if kind.name in width]
    total, least, most = sum(map(kind.count, dense)), min(counts), max(counts)
    each = f"{least:,} to {most:,}" if least < most else f"{most:,}"
    return f"{sum(counts):,} of {total:,} {kind.total} ({each} per block)"
