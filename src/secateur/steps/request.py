"""Options checked against the model: the problem that a plan must solve, or the plan of a file."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from secateur.base.errors import SecateurError
from secateur.criteria.registry import Criteria
from secateur.formats.format import Format, format_class
from secateur.model.stream import BlockStream
from secateur.plan.meters import meter_of, parameter_meter
from secateur.plan.plan import plan as solve
from secateur.plan.plan_file import read_plan
from secateur.plan.problem import Plan, PlanProblem
from secateur.plan.ratio_file import read_ratios
from secateur.plan.reach import check_near, check_reachable
from secateur.plan.similar_heads import check_heads
from secateur.plan.target import SPEEDUPS, Target
from secateur.plan.uniform import uniform_alternative, uniform_plans
from secateur.plan.widths import default_multiple
from secateur.steps.options import WIDTHS, Options

TINY_SHARE = 1e-6
"""Share of the parameters that is smaller than any unit."""


@dataclass(frozen=True)
class CheckedRequest:
    """The target, the widths that are allowed and the output format of a run, all checked against the model."""

    problem: PlanProblem
    plan_from_file: Plan | None
    """The plan of a file; None if the run makes the plan."""
    format: Format
    """The output format, bound to the model."""
    needs_survey: bool
    """Whether several plans meet the target, so that their costs must be measured."""


def check_request(stream: BlockStream, options: Options, dtype: torch.dtype) -> CheckedRequest:
    """Check the options against the model, without running it.

    Args:
        stream: The open model.
        options: Options that decide the result.
        dtype: Dtype of the weights to write.

    Raises:
        SecateurError: The plan is of another model, no plan can meet the target, or the output format cannot hold the
            result.
    """
    format, watcher = format_of(stream, options, dtype), stream.services.watcher
    problem = _problem(stream, options, format)
    if options.adds_biases and not any(module.may_gain_bias for block in stream.blocks for module in block.modules):
        watcher.note(
            "No bias is fitted: this model has a norm after each module, and a bias before a norm cannot "
            "compensate for removed units"
        )
    if options.parsed_criterion.compares_heads:
        check_heads(problem)
    plan = _plan_from_file(stream, options, problem)
    if plan is not None:
        check_plan(format, problem, plan, options.plan or options.widths)
        return CheckedRequest(problem, plan, format, False)
    target = options.size_target
    if isinstance(target, Target) and not options.targets_perplexity:
        if format.other_kernels and target.quantity in SPEEDUPS:
            watcher.note(
                f"The speed-up is measured with torch on this machine; {format.other_kernels} may gain more or less"
            )
        of_output = {"bytes": format.target_meter, "kv": format.cache_meter}
        meter = meter_of(target, stream, of_output, dtype, watcher, options.adds_biases)
        problem = replace(problem, meter=meter)
    return CheckedRequest(problem, None, format, _needs_survey(problem, options))


def format_of(stream: BlockStream, options: Options, dtype: torch.dtype) -> Format:
    """Return the output format of a run, bound to the open model."""
    return format_class(options.output_format.name)(
        stream,
        block_range=options.block_range(len(stream)),
        dtype=dtype,
        type=None if options.type == Options.type else options.type,
        biases=options.adds_biases,
        same_width=options.widths == "uniform",
    )


def check_plan(format: Format, problem: PlanProblem, plan: Plan, file: str | None = None) -> Plan:
    """Return the plan if the format can hold it.

    Args:
        format: The output format; some formats need widths of different blocks to match.
        problem: The widths to choose from, for the error.
        plan: The widths of the blocks to prune.
        file: Name of the file with the plan, for the error.

    Raises:
        SecateurError: The format cannot hold the plan.
    """
    if (reason := format.unsupported_plan(plan.widths)) is not None:
        is_uniform = plan.uniform and len(plan.widths) == len(format.stream)
        advice = "" if is_uniform else uniform_alternative(problem, plan.sparsity)
        place = f"{file}: " if file else ""
        raise SecateurError(f"{place}the {format.declaration.name} format cannot hold this plan: {reason}{advice}")
    return plan


def _problem(stream: BlockStream, options: Options, format: Format) -> PlanProblem:
    """Return the target, counted in parameters, and every width that the format can hold."""
    parameters = parameter_meter(stream, options.adds_biases)
    axes = [axis for block in stream.blocks for axis in block.axes]
    return PlanProblem(
        blocks=stream.blocks,
        pruned_blocks=options.block_range(len(stream)),
        parameters=parameters,
        target=options.size_target,
        meter=parameters,
        kinds=_kinds(stream, options),
        multiple=options.round or default_multiple(axes, format.row_multiple),
        unsupported_reason=cache(format.unsupported_reason),
    )


def _kinds(stream: BlockStream, options: Options) -> tuple[str, ...]:
    """Return the kinds of units that may be removed and that the model has.

    Raises:
        SecateurError: The model has no such units.
    """
    present = {axis.kind for block in stream.blocks for axis in block.axes}
    if Criteria(options.criterion_name).needs_gradients:
        # No backward pass runs through experts, so that their channels have no gradient scores.
        present = {kind for block in stream.blocks for kind in block.kinds}
    if not (kinds := tuple(kind for kind in options.prunable_kinds if kind in present)):
        asked, known = ",".join(options.prunable_kinds), " and ".join(sorted(present))
        raise SecateurError(f"--modules {asked}: the model has only {known}; name some of these")
    return kinds


def _needs_survey(problem: PlanProblem, options: Options) -> bool:
    """Return whether several plans meet the target.

    Raises:
        SecateurError: No plan meets it.
    """
    if options.parsed_criterion.only_compares_heads:
        return False
    # The size that a target of perplexity leads to is not known yet, but some unit must be removable.
    tried = replace(problem, target=TINY_SHARE) if options.targets_perplexity else problem
    if options.widths == "uniform":
        plans = uniform_plans(tried)
        check_near(plans[0])
        return len(plans) != 1 or options.targets_perplexity
    check_reachable(tried)
    if not isinstance(tried.target, Target):
        check_near(solve(tried))
    return True


def _plan_from_file(stream: BlockStream, options: Options, problem: PlanProblem) -> Plan | None:
    """Return the plan of the file that --plan or --widths names; None if neither names one."""
    if options.plan is not None:
        widths, units = read_plan(Path(options.plan), stream.blocks, stream.checkpoint.fingerprint)
    elif options.widths not in WIDTHS:
        widths, units = read_ratios(Path(options.widths), stream.blocks, problem.multiple), {}
    else:
        return None
    sparsity = problem.sparsity(widths)
    return Plan(widths, sparsity, sparsity, units=units)
