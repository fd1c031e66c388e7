"""Criterion `similarity` in a run: from distances between heads to the heads that can be removed together."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.progress import Watcher
from secateur.model.axes import Width
from secateur.model.stream import BlockStream
from secateur.model.structure import Block
from secateur.model.units.heads import HEADS_PER_GROUP, KV_GROUPS
from secateur.paper.similarity import find_similar_heads
from secateur.plan.preselection import Preselected
from secateur.plan.problem import Plan, PlanProblem
from secateur.plan.widths import head_widths
from secateur.survey.head_distances import head_distances


@dataclass(frozen=True)
class Similarity:
    """Preselection of heads whose distance is below a threshold; see `secateur.plan.preselection`."""

    tau: float
    """Threshold, in nats."""
    decides: bool
    """Whether only these heads are removed, and nothing else."""

    def check(self, problem: PlanProblem) -> None:
        """Check that at least one head can be removed."""
        check_heads(problem)

    def find(self, stream: BlockStream, rows: Tensor, problem: PlanProblem, watcher: Watcher) -> Preselected:
        """Compare the heads of the dense model on calibration rows (rows x length), and return the similar ones."""
        distances = head_distances(stream, rows, blocks=problem.pruned_blocks, watcher=watcher)
        if not self.decides:
            return Preselected(find_similar_heads(distances, self.tau))
        plan = similar_plan(problem, distances, self.tau)
        assert plan.first_heads is not None
        return Preselected(plan.first_heads, plan)


def check_heads(problem: PlanProblem) -> None:
    """Check that at least one head can be removed, before anything is measured.

    Raises:
        SecateurError: The model or the output format does not allow fewer heads.
    """
    reasons = []
    blocks = [problem.blocks[index] for index in problem.pruned_blocks]
    if all(block.attention.locked for block in blocks):
        why = blocks[0].attention.locked
        raise SecateurError(f"heads cannot be removed exactly, because {why}; choose another criterion")
    for block in blocks:
        found = [problem.unsupported_reason(width) for width in _narrower(block)]
        if None in found:
            return
        reasons += found
    if reasons:
        raise SecateurError(f"the format cannot hold fewer heads: {reasons[0]}")
    raise SecateurError("the blocks have one head each; similarity has nothing to compare: choose another criterion")


def similar_plan(problem: PlanProblem, distances: Mapping[int, Tensor], tau: float) -> Plan:
    """Return the plan that removes similar heads and nothing else; it lists the units to keep.

    Raises:
        SecateurError: No heads are similar, or all but one head of every block are.
    """
    found = find_similar_heads(distances, tau)
    removed, widths, units = {}, {}, {}
    for index, heads in found.candidates.items():
        block = problem.blocks[index]
        removed[index], widths[index] = loadable(problem, index, heads)
        kept_heads = tuple(head for head in range(block.attention.units) if head not in removed[index])
        units[index] = dict(zip(block.kinds, (kept_heads, tuple(range(block.feed_forward.units))), strict=True))
    if not any(removed.values()):
        count = sum(map(len, found.candidates.values()))
        raise SecateurError(
            f"tau is {tau:g}, which removes nothing: its {count} similar heads are neither a whole KV group nor one "
            f"head of every group; the distances between heads go from {found.range[0]:.3g} to {found.range[1]:.3g}; "
            "choose a larger tau"
        )
    size = problem.parameters.module_size
    dense, kept = (
        sum(size(index, "heads", one) for index, one in some.items())
        for some in ({index: problem.blocks[index].width for index in widths}, widths)
    )
    found = replace(found, removed=removed, share=1 - kept / dense)
    reached = problem.sparsity(widths)
    return Plan(widths, reached, reached, note=found.describe(), units=units, first_heads=found)


def loadable(problem: PlanProblem, index: int, similar: tuple[int, ...]) -> tuple[tuple[int, ...], Width]:
    """Return the candidates of a block that can be removed together, and the width that is left.

    Removable together are KV groups whose heads are all candidates, or equally many candidates of every group. Of the
    two, the one that removes more parameters and that the output format supports is returned.
    """
    block = problem.blocks[index]
    module = block.attention
    members = [[head for head in similar if head // module.per_group == group] for group in range(module.groups)]
    whole = [group for group, heads in enumerate(members) if len(heads) == module.per_group]
    each = min(map(len, members))
    best: tuple[int, ...] = ()
    width = block.width
    least = problem.parameters.module_size(index, "heads", width)
    for narrower in _narrower(block):
        by_groups = narrower[KV_GROUPS] < module.groups
        count = module.groups - narrower[KV_GROUPS] if by_groups else module.per_group - narrower[HEADS_PER_GROUP]
        size = problem.parameters.module_size(index, "heads", narrower)
        if (
            count > (len(whole) if by_groups else each)
            or size >= least
            or problem.unsupported_reason(narrower) is not None
        ):
            continue
        least, width = size, narrower
        chosen = [members[group] for group in whole[:count]] if by_groups else [heads[:count] for heads in members]
        best = tuple(sorted(head for heads in chosen for head in heads))
    return best, width


def _narrower(block: Block) -> list[Width]:
    """Return the widths of a block with fewer heads, but at least one."""
    return head_widths(block, ("heads",))[1:]
