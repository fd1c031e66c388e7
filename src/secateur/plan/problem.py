"""What a plan is, and the problem that it solves."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from secateur.model.axes import Width, alike
from secateur.model.kinds import KINDS
from secateur.model.structure import Block, PrunableModule
from secateur.plan.meters import Meter, budget_of
from secateur.plan.target import Target
from secateur.plan.widths import UnsupportedReason, module_widths

TOLERANCE = 0.005
"""A plan within half a point of the wanted sparsity is on target."""
NEGLIGIBLE_COST = 1e-3
"""Nats per token that no one would notice."""


class FirstHeads(Protocol):
    """Heads that leave before all others (`secateur.plan.preselection`)."""

    @property
    def name(self) -> str:
        """Key of the record under which they stand."""

    @property
    def candidates(self) -> Mapping[int, tuple[int, ...]]:
        """Heads by block."""

    def as_dict(self) -> dict[str, Any]:
        """Return the record."""

    def describe(self) -> str:
        """Return one clause for people."""


@dataclass(frozen=True)
class Plan:
    """Widths of the pruned blocks, and what they amount to."""

    widths: dict[int, Width]
    sparsity: float
    """Share of the chosen blocks' parameters that goes."""
    requested_sparsity: float
    """The share that was asked for, or the one that the target came to."""
    cost: float | None = None
    """What the survey expects it to cost, in nats per token; None if nothing was weighed."""
    note: str | None = None
    """Said when the wanted share could not be had to within half a point."""
    units: Mapping[int, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    """The units to keep, by block and module, where they are settled; otherwise the criterion chooses while fitting."""
    first_heads: FirstHeads | None = None
    """Heads that leave before all others, where something was measured to find them."""

    @property
    def uniform(self) -> bool:
        """Whether all blocks of the plan have one width."""
        return alike(self.widths.values())

    @property
    def lists_units(self) -> bool:
        """Whether the units of every module are settled, so that no criterion is asked."""
        return all(len(self.units.get(index, {})) > 1 for index in self.widths)


@dataclass(frozen=True)
class PlanProblem:
    """A target, and what a plan may do to meet it."""

    blocks: list[Block]
    """Every block of the model."""
    pruned_blocks: range
    """Those to prune."""
    parameters: Meter
    target: float | Target
    """The share of parameters to remove, or another target."""
    meter: Meter
    """Of what the target is about."""
    kinds: tuple[str, ...] = KINDS
    multiple: int = 1
    unsupported_reason: UnsupportedReason = lambda _: None

    @property
    def modules(self) -> list[tuple[int, PrunableModule]]:
        """Modules that may be cut, with the index of the block."""
        return [(index, module) for index in self.pruned_blocks for module in self.prunable_modules(index)]

    def widths_of(self, index: int, module: PrunableModule) -> list[Width]:
        """Return the widths that a module of a block may have, dense first."""
        return module_widths(self.blocks[index], module, self.multiple, self.unsupported_reason, self.kinds)

    def prunable_modules(self, index: int) -> list[PrunableModule]:
        """Those of one block that may be cut."""
        return self.is_prunable(self.blocks[index])

    def is_prunable(self, block: Block) -> list[PrunableModule]:
        """Return the modules of a block that may be cut."""
        return [module for module in block.modules if module.is_prunable(self.kinds)]

    @property
    def reference_block(self) -> Block:
        """The chosen block that speaks for the others where all get one width: the first with experts, if any has, and
        with heads that can go."""
        every = [self.blocks[index] for index in self.pruned_blocks]
        return max(every, key=lambda block: (block.feed_forward.kind == "experts", not block.attention.fixed))

    def uniform_widths(self, width: Width) -> dict[int, Width]:
        """Return one width for all chosen blocks: each takes the numbers along its own axes that can change."""
        found = {}
        for index in self.pruned_blocks:
            block = self.blocks[index]
            names = [axis.name for axis in block.axes if axis.name in width and not axis.locked]
            found[index] = block.width | {name: width[name] for name in names}
        return found

    @property
    def block_parameters(self) -> float:
        """The parameters of which a share may go: those of the chosen blocks."""
        return float(sum(self.blocks[index].parameters for index in self.pruned_blocks))

    @property
    def budget(self) -> float:
        """The most that the model may take, in the meter's unit."""
        if isinstance(self.target, Target):
            return budget_of(self.target, self.meter)
        return self.meter.dense - self.target * self.block_parameters

    def sparsity(self, widths: dict[int, Width]) -> float:
        """Share of the counted parameters that goes at some widths."""
        return (self.parameters.dense - self.parameters.total(widths)) / self.block_parameters

    def plan(self, widths: dict[int, Width], cost: float | None = None, *, nearest: bool = False) -> Plan:
        """A plan of these widths, the nearest or those that cost least, with a note where it is off target."""
        reached = self.sparsity(widths)
        if isinstance(self.target, Target):
            return Plan(widths, reached, reached, cost)
        note = None
        if abs(reached - self.target) > TOLERANCE:
            best = "it is the nearest" if nearest else "that costs least"
            why = f"{best} among the widths that the format and the rounding allow"
            if reached > self.target and cost is not None and cost < NEGLIGIBLE_COST:
                why = "all of it is of units that give next to nothing"
            note = f"{reached:.1%} goes in place of {self.target:.1%}: {why}"
        return Plan(widths, reached, self.target, cost, note)
