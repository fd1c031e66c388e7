"""Criterion `similarity`: of two heads with similar attention, one can be removed (criterion A and Algorithm 2 of the
paper).

Alone, the criterion makes a plan that lists the heads to keep. Before another criterion, heads that are similar to
another head are removed first, and further units by that criterion.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.model.axes import Width
from secateur.model.units.heads import HEADS_PER_GROUP, KV_GROUPS
from secateur.plan.problem import Plan, PlanProblem, SimilarHeads
from secateur.plan.widths import head_widths


def candidates(distances_hh: Tensor, tau: float) -> tuple[int, ...]:
    """Return the heads that can be removed, in ascending order.

    Algorithm 2 of the paper visits all pairs (i, j) with i != j, with i in the outer and j in the inner loop. If the
    distance of a pair is below tau and neither head is a candidate yet, i becomes a candidate. So the lower index of a
    similar pair is removed, and the last head of a group of similar heads stays.

    Args:
        distances_hh: Distances between the heads of one module (heads x heads).
        tau: Threshold in the unit of the distances.
    """
    near = distances_hh < tau
    near.fill_diagonal_(False)
    free = torch.ones(len(near), dtype=torch.bool)
    for i in range(len(near)):
        # While row i is processed only i itself can become a candidate, and that ends the row.
        free[i] = not bool((near[i] & free).any())
    return tuple((~free).nonzero()[:, 0].tolist())


def find_similar_heads(distances: Mapping[int, Tensor], tau: float) -> SimilarHeads:
    """Return the similar heads of every block.

    Args:
        distances: Distances between the heads of each block (heads x heads).
        tau: Threshold in the unit of the distances.

    Raises:
        SecateurError: No heads are similar, or all are.
    """
    pairs = torch.cat([table[torch.ones_like(table, dtype=torch.bool).triu(1)] for table in distances.values()])
    least, largest = float(pairs.min()), float(pairs.max())
    if tau <= least:
        raise SecateurError(
            f"tau is {tau:g}, which removes nothing: the distances between heads go from {least:.3g} to {largest:.3g}; "
            f"choose a tau above {_rounded(least, math.ceil)}"
        )
    near = {index: candidates(table, tau) for index, table in distances.items()}
    # Algorithm 2 keeps at least one head.
    if all(len(heads) == len(distances[index]) - 1 for index, heads in near.items()):
        less = "a smaller tau" if tau <= largest else f"a tau below {_rounded(largest, math.floor)}"
        raise SecateurError(
            f"tau is {tau:g}, which leaves each block a single head: the distances between heads go from {least:.3g} "
            f"to {largest:.3g}; choose {less}"
        )
    return SimilarHeads(tau, (least, largest), near)


def check_heads(problem: PlanProblem) -> None:
    """Check that at least one head can be removed, before anything is measured.

    Raises:
        SecateurError: The model or the output format does not allow fewer heads.
    """
    reasons = []
    blocks = [problem.blocks[index] for index in problem.pruned_blocks]
    if all(block.heads_locked for block in blocks):
        why = blocks[0].heads_locked
        raise SecateurError(f"heads cannot be removed exactly, because {why}; choose another criterion")
    for block in blocks:
        found = [problem.unsupported_reason(width) for width in head_widths(block, ("heads",))[1:]]
        if None in found:
            return
        reasons += found
    if reasons:
        raise SecateurError(f"the format cannot hold fewer heads: {reasons[0]}")
    raise SecateurError("the blocks have one head each; similarity has nothing to compare: choose another criterion")


def similar_plan(problem: PlanProblem, found: SimilarHeads) -> tuple[SimilarHeads, Plan]:
    """Return which similar heads are removed, and the plan that removes nothing else; it lists the units to keep.

    Raises:
        SecateurError: No heads can be removed together.
    """
    removed, widths, units = {}, {}, {}
    dense = kept = 0.0
    for index, heads in found.candidates.items():
        block = problem.blocks[index]
        removed[index], widths[index] = loadable(problem, index, heads)
        units[index] = {module.kind: tuple(range(module.units)) for module in block.modules}
        units[index]["heads"] = tuple(head for head in units[index]["heads"] if head not in removed[index])
        dense += problem.parameters.module_size(index, "heads", block.width)
        kept += problem.parameters.module_size(index, "heads", widths[index])
    if not any(removed.values()):
        count = sum(map(len, found.candidates.values()))
        raise SecateurError(
            f"tau is {found.tau:g}, which removes nothing: its {count} similar heads are neither a whole KV group nor "
            f"one head of every group; the distances between heads go from {found.range[0]:.3g} to "
            f"{found.range[1]:.3g}; choose a larger tau"
        )
    reached = problem.sparsity(widths)
    found = replace(found, removed=removed, share=1 - kept / dense)
    return found, Plan(widths, reached, reached, note=found.describe(), units=units)


def loadable(problem: PlanProblem, index: int, similar: tuple[int, ...]) -> tuple[tuple[int, ...], Width]:
    """Return the candidates of a block that can be removed together, and the width that is left.

    Removable together are KV groups whose heads are all candidates, or equally many candidates of every group. Of the
    two, the one that removes more parameters and that the output format supports is returned.
    """
    block = problem.blocks[index]
    module = block.module("heads")
    members = [[head for head in similar if head // module.per_group == group] for group in range(module.groups)]
    whole = [group for group, heads in enumerate(members) if len(heads) == module.per_group]
    best, width = tuple[int, ...](), block.width
    least = problem.parameters.module_size(index, "heads", width)
    for narrower in head_widths(block, ("heads",))[1:]:
        if narrower[KV_GROUPS] < module.groups:
            removed = [members[group] for group in whole[: module.groups - narrower[KV_GROUPS]]]
            possible = len(removed) == module.groups - narrower[KV_GROUPS]
        else:
            count = module.per_group - narrower[HEADS_PER_GROUP]
            removed = [heads[:count] for heads in members]
            possible = count <= min(map(len, members))
        size = problem.parameters.module_size(index, "heads", narrower)
        if possible and size < least and problem.unsupported_reason(narrower) is None:
            least, width, best = size, narrower, tuple(sorted(itertools.chain(*removed)))
    return best, width


def _rounded(value: float, way: Callable[[float], int]) -> str:
    """Return a number with four decimals as text, rounded up or down by `way`."""
    return f"{way(value * 1e4) / 1e4:g}"
