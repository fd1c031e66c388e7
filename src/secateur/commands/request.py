"""A request checked against the model: the problem that a plan must solve, or the plan that a file spells out."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from secateur.base.errors import SecateurError
from secateur.commands.options import WIDTHS, Options
from secateur.criteria.registry import Criteria
from secateur.formats.format import Format, format_class
from secateur.model.stream import BlockStream
from secateur.plan.meters import Meter, meter_of, parameter_meter
from secateur.plan.plan import check_reachable, uniform_alternative, uniform_plans
from secateur.plan.plan_file import read_plan
from secateur.plan.problem import Plan, PlanProblem
from secateur.plan.ratio_file import read_ratios
from secateur.plan.target import SPEEDUPS, Target
from secateur.plan.widths import default_multiple

TINY_SHARE = 1e-6
"""A share of the parameters that any cut exceeds."""


@dataclass(frozen=True)
class CheckedRequest:
    """What a plan has to do, all of it checked against the model and none of it slow."""

    problem: PlanProblem
    plan_from_file: Plan | None
    """The plan that a file spells out: nothing is left to solve."""
    format: Format
    """The output format, bound to the model."""
    needs_survey: bool
    """There is more than one plan to choose from."""

    @property
    def block_range(self) -> range:
        """The blocks to prune."""
        return self.problem.pruned_blocks

    @property
    def parameters(self) -> Meter:
        """The meter of parameters."""
        return self.problem.parameters


def check_request(stream: BlockStream, options: Options, dtype: torch.dtype) -> CheckedRequest:
    """Check what is asked for against the model.

    Raises:
        SecateurError: a plan that does not belong to the model, a target that no plan can meet, or a format that
            cannot hold what is asked for.
    """
    format, watcher = format_of(stream, options, dtype), stream.services.watcher
    problem = _problem(stream, options, format)
    if options.adds_biases and not any(module.may_gain_bias for block in stream.blocks for module in block.modules):
        watcher.note("No bias is fitted: this model has a norm behind each module, where none makes up for what goes")
    if options.preselection is not None:
        options.preselection.check(problem)
    given = _plan_from_file(stream, options, problem)
    if given is not None:
        check_plan(format, given, options.plan or options.widths)
        return CheckedRequest(problem, given, format, False)
    if isinstance(options.size_target, Target) and not options.targets_perplexity:
        if format.other_kernels and options.size_target.quantity in SPEEDUPS:
            watcher.note(
                f"Speed is measured with torch's kernels on this machine; {format.other_kernels}'s may gain otherwise"
            )
        meter = meter_of(
            options.size_target,
            stream,
            output_bytes=format.byte_meter,
            dtype=dtype,
            device=stream.device,
            watcher=watcher,
            biases=options.adds_biases,
        )
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


def check_plan(format: Format, decided: Plan, file: str | None = None) -> Plan:
    """Return a plan that the format holds, whose blocks some formats bind to each other.

    Raises:
        SecateurError: the format cannot hold all of the plan together; the error names the file that has it.
    """
    if (reason := format.unsupported_plan(decided.widths)) is not None:
        whole = decided.uniform and len(decided.widths) == len(format.stream)
        more = "" if whole else f"; the nearest that fits: {uniform_alternative(decided.sparsity)}"
        place = f"{file}: " if file else ""
        raise SecateurError(f"{place}the {format.declaration.name} format cannot hold this plan: {reason}{more}")
    return decided


def _problem(stream: BlockStream, options: Options, format: Format) -> PlanProblem:
    """The target of the parameters, and every width that the format can hold."""
    chosen = options.block_range(len(stream))
    parameters = parameter_meter(stream, options.adds_biases)

    return PlanProblem(
        blocks=stream.blocks,
        pruned_blocks=chosen,
        parameters=parameters,
        target=options.size_target,
        meter=parameters,
        kinds=_kinds(stream, options),
        multiple=options.round or default_multiple([axis for block in stream.blocks for axis in block.axes]),
        unsupported_reason=cache(format.unsupported_reason),
    )


def _kinds(stream: BlockStream, options: Options) -> tuple[str, ...]:
    """The units that may go, of those that the model has."""
    there = {kind for block in stream.blocks for kind in block.kinds}
    if "experts" in there and not Criteria(options.criterion_name).needs_gradients:
        # Theirs are no part of what is trained backward.
        there.add("channels")
    if not (kinds := tuple(kind for kind in options.prunable_kinds if kind in there)):
        known = " and ".join(sorted(there))
        asked = ",".join(options.prunable_kinds)
        raise SecateurError(f"--modules {asked}: the model has {known} alone; name some of these")
    return kinds


def _needs_survey(problem: PlanProblem, options: Options) -> bool:
    """Whether there is more than one plan; see first that there is any."""
    if options.parsed_criterion.preselection_only:
        return False
    # How much a loss of perplexity allows is not known yet, but something must be able to go.
    aim = replace(problem, target=TINY_SHARE) if options.targets_perplexity else problem
    if options.widths == "uniform":
        return len(uniform_plans(aim)) != 1 or options.targets_perplexity
    check_reachable(aim)
    return True


def _plan_from_file(stream: BlockStream, options: Options, problem: PlanProblem) -> Plan | None:
    """The plan that a file spells out."""
    if options.plan is not None:
        widths, units = read_plan(Path(options.plan), stream.blocks, stream.checkpoint.fingerprint)
        reached = problem.sparsity(widths)
        return Plan(widths, reached, reached, units=units)
    if options.widths in WIDTHS:
        return None
    widths = read_ratios(Path(options.widths), stream.blocks, problem.multiple)
    reached = problem.sparsity(widths)
    return Plan(widths, reached, reached)
