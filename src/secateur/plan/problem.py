"""Data classes of a plan and of the problem that a plan solves."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.model.axes import FEED_FORWARD, Width, alike
from secateur.model.kinds import KINDS
from secateur.model.structure import Block, KeptUnits, PrunableModule, combined
from secateur.plan.meters import Meter, budget_of
from secateur.plan.target import Target
from secateur.plan.widths import UnsupportedReason, module_widths

TOLERANCE = 0.005
"""Largest difference between the requested and the reached sparsity that needs no note: 0.5 percentage points."""
LARGEST_MISS = 0.1
"""Largest difference with a note; a larger one is an error."""


@dataclass(frozen=True)
class SimilarHeads:
    """Similar heads of the pruned blocks, which are removed before all others (`secateur.plan.similar_heads`)."""

    tau: float
    """Distance in nats below which two heads are similar."""
    range: tuple[float, float]
    """Smallest and largest distance between two heads of a block."""
    candidates: dict[int, tuple[int, ...]]
    """Heads of each block that are similar to another one."""
    removed: dict[int, tuple[int, ...]] | None = None
    """Heads of each block that are removed, where similarity alone decides; they leave KV groups of equal size."""
    share: float | None = None
    """Share of the attention parameters of the pruned blocks that these heads have."""

    def as_dict(self) -> dict[str, Any]:
        """Return the contents for the record of a run."""
        record: dict[str, Any] = {"tau": self.tau, "distances": list(self.range), "attention_share": self.share}
        blocks = []
        for index, heads in self.candidates.items():
            removed = {} if self.removed is None else {"removed": list(self.removed[index])}
            blocks.append({"block": index, "candidates": list(heads), **removed})
        return record | {"blocks": blocks}

    def describe(self) -> str:
        """Return a clause about the number of similar heads."""
        found = sum(map(len, self.candidates.values()))
        what = f"tau {self.tau:.4g} finds {found} similar heads (distances {self.range[0]:.3g} to {self.range[1]:.3g})"
        if self.removed is None:
            return f"{what}; they are the first to be removed from each module"
        gone = sum(map(len, self.removed.values()))
        which = "all" if gone == found else f"{gone} (whole KV groups, or equally many of each group)"
        return f"{what}; {which} are removed, {self.share:.1%} of the attention's parameters"


@dataclass(frozen=True)
class Plan:
    """Widths of the pruned blocks, with the sparsity and the cost of these widths."""

    widths: dict[int, Width]
    """Width of each pruned block, by its index."""
    sparsity: float
    """Share of the parameters of the pruned blocks that is removed."""
    requested_sparsity: float
    """Requested share; equal to `sparsity` where another target than a sparsity was requested."""
    cost: float | None = None
    """Expected rise of the loss in nats per token, by the survey; None without a survey."""
    note: str | None = None
    """Note to users where the sparsity differs from the requested one by more than 0.5 percentage points."""
    units: Mapping[int, KeptUnits] = field(default_factory=dict)
    """Units to keep, by index of the block; empty if the criterion selects the units during the fit."""
    similar_heads: SimilarHeads | None = None
    """Heads to remove before all others; None unless the criterion compares heads."""

    @property
    def uniform(self) -> bool:
        """Whether all blocks of the plan have the same width."""
        return alike(self.widths.values())

    @property
    def lists_units(self) -> bool:
        """Whether the plan lists the units to keep of every module, so that no criterion is needed."""
        return all(self.units.get(index, {}).keys() >= set(width.kinds) for index, width in self.widths.items())


@dataclass(frozen=True)
class PlanProblem:
    """Target of a plan, and the widths from which a plan may choose."""

    blocks: list[Block]
    """All blocks of the model."""
    pruned_blocks: range
    """Indices of the blocks to prune."""
    parameters: Meter
    """Meter of the parameters, which defines the sparsity."""
    target: float | Target
    """Share of the parameters to remove, or another target."""
    meter: Meter
    """Meter of the quantity that the target limits."""
    kinds: tuple[str, ...] = KINDS
    """Kinds of units that may be removed, as in `--modules`."""
    multiple: int = 1
    """Value of `--round`: the multiple to which channels are rounded."""
    unsupported_reason: UnsupportedReason = lambda _: None
    """Function that returns why the output format cannot hold a width."""

    @property
    def modules(self) -> list[tuple[int, PrunableModule]]:
        """Prunable modules of all pruned blocks, each with the index of its block."""
        return [(index, module) for index in self.pruned_blocks for module in self.prunable_modules(index)]

    @property
    def dense_widths(self) -> dict[int, Width]:
        """Dense width of each pruned block, by its index."""
        return {index: self.blocks[index].width for index in self.pruned_blocks}

    def options(self, index: int, module: PrunableModule) -> list[tuple[Width, float]]:
        """Return the widths of a block that a plan may choose for a module, the dense one first.

        Each comes with the size of the module, in the meter's unit.
        """
        widths = module_widths(self.blocks[index], module, self.multiple, self.unsupported_reason, self.kinds)
        return [(width, float(self.meter.module_size(index, module.kind, width))) for width in widths]

    @property
    def smallest_size(self) -> float:
        """Size of the model with every module at its narrowest width, in the meter's unit."""
        sizes = [[size for _, size in self.options(*each)] for each in self.modules]
        return self.meter.total(self.dense_widths) + sum(min(each) - each[0] for each in sizes)

    def prunable_modules(self, index: int) -> list[PrunableModule]:
        """Return the modules of a block that have units of a kind that may be removed."""
        return [module for module in self.blocks[index].modules if module.is_prunable(self.kinds)]

    @property
    def reference_block(self) -> Block:
        """Block that has all axes of the model: its width determines the widths of uniform plans.

        It is the first pruned block whose feed-forward has the most axes and, among these, whose attention is prunable.
        If only other blocks have such an attention, the block is combined from the two.
        """
        blocks = [self.blocks[index] for index in self.pruned_blocks]
        found = max(blocks, key=lambda block: (len(block.axes_in(FEED_FORWARD)), block.loses_heads))
        headed = next((block for block in blocks if block.loses_heads), found)
        if found.loses_heads or headed is found:
            return found
        return combined((headed, found), ["heads", *(m.kind for m in found.modules if m.role == FEED_FORWARD)])

    def uniform_widths(self, width: Width) -> dict[int, Width]:
        """Return a width for each pruned block, all with the same numbers of units.

        A block takes over the numbers along the axes that it has. Its other axes, and its locked axes, stay dense.
        """
        return {
            index: dense | {axis.name: width[axis.name] for axis in self.blocks[index].free_axes if axis.name in width}
            for index, dense in self.dense_widths.items()
        }

    def can_become(self, widths: Mapping[int, Width]) -> bool:
        """Return whether one pruning makes every block as narrow as some widths, which widen no block."""
        return all(module.can_become(width) for i, width in widths.items() for module in self.blocks[i].modules)

    @property
    def block_parameters(self) -> float:
        """Number of parameters of the pruned blocks, of which the sparsity is a share."""
        return float(sum(self.blocks[index].parameters for index in self.pruned_blocks))

    @property
    def budget(self) -> float:
        """Largest size that the target allows, in the meter's unit."""
        if isinstance(self.target, Target):
            return budget_of(self.target, self.meter)
        return self.meter.dense - self.target * self.block_parameters

    @property
    def slack(self) -> float:
        """Largest excess over the budget of a result that counts as on target, in the meter's unit.

        A sparsity is reached to within 0.5 percentage points; any other target is an upper bound.
        """
        return 0.0 if isinstance(self.target, Target) else TOLERANCE * self.block_parameters

    def sparsity(self, widths: dict[int, Width]) -> float:
        """Return the share of the parameters of the pruned blocks that is removed at given widths."""
        return (self.parameters.dense - self.parameters.total(widths)) / self.block_parameters

    def plan(self, widths: dict[int, Width], cost: float | None = None) -> Plan:
        """Return the plan with given widths, which are on target or the nearest to it.

        Args:
            widths: Width of each pruned block, by its index.
            cost: Expected rise of the loss in nats per token, if known.
        """
        reached = self.sparsity(widths)
        if isinstance(self.target, Target):
            return Plan(widths, reached, reached, cost)
        note = (
            f"sparsity is {reached:.1%} instead of {self.target:.1%}: among the widths that the format and --round "
            "allow, this is the nearest"
        )
        return Plan(widths, reached, self.target, cost, None if abs(reached - self.target) <= TOLERANCE else note)
