"""What is kept where: a width for every pruned block, decided under one target before any weight is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from secateur.base.errors import SecateurError
from secateur.criteria import pattern_units
from secateur.model.structure import KINDS, Block, Keep, Kind, Width
from secateur.plan.allocation import Obstacle, adaptive, merge, narrowest, uniform
from secateur.plan.meters import Meter, budget_of, unreachable
from secateur.plan.target import Target
from secateur.survey.curves import Curve, Survey
from secateur.survey.prices import Prices

TOLERANCE = 0.005
"""A plan within half a point of the wanted sparsity is on target."""


@dataclass(frozen=True)
class Plan:
    """Widths of the pruned blocks, and what they amount to."""

    widths: dict[int, Width]
    sparsity: float
    """Share of the counted parameters that goes."""
    wanted: float
    """The share that was asked for, or the one that the target came to."""
    of: str
    """What the share counts: `blocks`, the pruned ones, or `model`."""
    price: float | None = None
    """What the survey expects it to cost, in nats per token; None if nothing was weighed."""
    note: str | None = None
    """Said when the wanted share could not be had to within half a point."""
    keeps: dict[int, Keep] | None = None
    """Exact units, where a person has named them; otherwise the criterion chooses."""

    @property
    def uniform(self) -> bool:
        """Whether all blocks of the plan have one width."""
        return len(set(self.widths.values())) == 1


@dataclass(frozen=True)
class Wish:
    """What a plan must meet, and what it may do for it."""

    blocks: list[Block]
    """Every block of the model."""
    chosen: range
    """Those to prune."""
    parameters: Meter
    goal: float | Target
    """The share of parameters to remove, or another target."""
    meter: Meter
    """Of what the target is about."""
    of: str = "blocks"
    """What a share counts: the chosen `blocks`, or the whole `model`."""
    kinds: tuple[Kind, ...] = KINDS
    multiple: int = 1
    obstacle: Obstacle = lambda _: None

    @property
    def counted(self) -> float:
        """The parameters of which a share may go."""
        if self.of == "model":
            return self.parameters.dense
        return float(sum(self.blocks[index].parameters for index in self.chosen))

    @property
    def budget(self) -> float:
        """The most that the model may take, in the meter's unit."""
        if isinstance(self.goal, Target):
            return budget_of(self.goal, self.meter)
        return self.meter.dense - self.goal * self.counted

    @property
    def least(self) -> float:
        """The least that the model can take with adaptive widths, in the meter's unit."""
        return narrowest(
            self.blocks, self.chosen, self.meter, kinds=self.kinds, multiple=self.multiple, obstacle=self.obstacle
        )

    def sparsity(self, widths: dict[int, Width]) -> float:
        """Share of the counted parameters that goes at some widths."""
        return (self.parameters.dense - self.parameters.total(widths)) / self.counted

    def plan(self, widths: dict[int, Width], price: float | None = None) -> Plan:
        """A plan of these widths, with a note where it is off target."""
        reached = self.sparsity(widths)
        if isinstance(self.goal, Target):
            return Plan(widths, reached, reached, self.of, price)
        note = None
        if abs(reached - self.goal) > TOLERANCE:
            best = "it is the nearest" if len(set(widths.values())) == 1 else "that costs least"
            among = "among the widths that the format and the rounding allow"
            note = f"{reached:.1%} goes in place of {self.goal:.1%}: {best} {among}"
        return Plan(widths, reached, self.goal, self.of, price, note)


def plan(wish: Wish, widths: str = "adaptive", survey: Survey | None = None) -> Plan:
    """The widths that cost least and meet the target.

    Args:
        wish: target and limits.
        widths: `adaptive`, each module its own; or `uniform`, one width for all chosen blocks.
        survey: error curves and probes; without one, a uniform plan is the nearest to the target, and adaptive widths
            are as even as they can be.

    Raises:
        SecateurError: for a target that the modules cannot meet, with the nearest that they can.
    """
    if widths == "uniform":
        possible = uniform_plans(wish)
        if survey is None:
            return possible[0]
        prices = Prices(survey)
        costs = [prices.total(wish.blocks, one.widths) for one in possible]
        return replace(possible[costs.index(min(costs))], price=min(costs))
    prices = Prices(survey or _even(wish))
    found = adaptive(
        wish.blocks,
        wish.chosen,
        prices,
        wish.meter,
        wish.budget,
        kinds=wish.kinds,
        multiple=wish.multiple,
        obstacle=wish.obstacle,
    )
    if found is None:
        raise _out_of_reach(wish, wish.least, [])
    return wish.plan(found, prices.total(wish.blocks, found) if survey else None)


def _even(wish: Wish) -> Survey:
    """Stands in for a survey: the square of the share of its units that goes is what a module costs."""
    curves = [
        Curve(index, module.kind, pattern, tuple((gone / units) ** 2 for gone in range(units)), 1.0)
        for index in wish.chosen
        for module in (wish.blocks[index].attention, wish.blocks[index].feed_forward)
        for pattern in module.patterns
        for units in [pattern_units(module, pattern)]
    ]
    return Survey("none", 0.0, 0, tuple(curves))


def uniform_plans(wish: Wish) -> list[Plan]:
    """Every split of one width between heads and channels that meets the target, the nearest first.

    Raises:
        SecateurError: there is none.
    """
    share = not isinstance(wish.goal, Target)
    found, least, reasons = uniform(
        wish.blocks,
        wish.chosen,
        wish.meter,
        wish.budget,
        kinds=wish.kinds,
        multiple=wish.multiple,
        obstacle=wish.obstacle,
        over=share,
    )
    if least == wish.meter.dense:
        raise SecateurError(_nothing(wish, reasons))
    # A share of the parameters is met to within half a point, anything else is a limit.
    slack = TOLERANCE * wish.counted if share else 0.0
    if not found or least > wish.budget + slack:
        raise _out_of_reach(wish, least, reasons)
    found.sort(key=lambda one: abs(one[1] - wish.budget))
    plans = [wish.plan(dict.fromkeys(wish.chosen, width)) for width, _ in found]
    near = [one for one in plans if one.note is None]
    return near or plans[:1]


def nearest_uniform(sparsity: float) -> str:
    """How to ask for as much with one width for all blocks, which every format holds."""
    return f"--widths uniform --sparsity {sparsity:.3g}"


def check_reach(wish: Wish) -> None:
    """See that adaptive widths can meet the target, before anything is measured.

    Raises:
        SecateurError: they cannot; it says what they can.
    """
    least = wish.least
    dense = wish.blocks[wish.chosen.start].width
    reasons = list(filter(None, (wish.obstacle(merge(dense, kind, Width(0, 0, 0))) for kind in wish.kinds)))
    if least >= wish.meter.dense and (reasons or not isinstance(wish.goal, Target)):
        raise SecateurError(_nothing(wish, reasons))
    # Sums in another order are rounded otherwise.
    if least > wish.budget + 1e-9 * wish.meter.dense:
        raise _out_of_reach(wish, least, reasons)


def _out_of_reach(wish: Wish, least: float, reasons: list[str]) -> SecateurError:
    """The target is more than the modules hold."""
    if isinstance(wish.goal, Target):
        return unreachable(wish.goal, wish.meter, least)
    # Rounded down, so that it can be had.
    most = math.floor(1000 * (wish.meter.dense - least) / wish.counted) / 1000
    return SecateurError(
        f"a sparsity of {wish.goal:.1%} of the {wish.of} is more than the modules hold: at most {most:.1%} can go"
        + (" (only heads or only channels were asked for)" if len(wish.kinds) == 1 else "")
        + (f"; {reasons[0]}" if reasons and len(wish.kinds) > 1 else "")
    )


def _nothing(wish: Wish, reasons: list[str]) -> str:
    """Why no width is left at all."""
    block = wish.blocks[wish.chosen.start]
    if reasons:
        return f"the format cannot hold this: {reasons[0]}"
    if "channels" in wish.kinds and wish.multiple >= block.feed_forward.units:
        return f"round is {wish.multiple}, but the model has {block.feed_forward.units:,} channels; take a smaller one"
    if block.attention.locked:
        return f"heads cannot be removed exactly, as {block.attention.locked}; prune channels"
    return "one head and one channel are all that there is; nothing can go"
