"""Axes along which modules become narrower, and widths: how many units are kept along each axis.

A block's width is a mapping from axis names to numbers. Plan files, costs, tables, pages and formats loop over axes, so
a new kind of unit is a new axis and no change to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from secateur.base.discovery import import_modules

if TYPE_CHECKING:
    from secateur.families.entry import Family

ConfigKeys = Mapping[tuple[str, ...], tuple[str, ...]]
"""Config keys of numbers of units, by the nested axes along which these lie: the key that the family's class reads,
then other keys of the same number that a config may have."""

LEVELS = 256
"""Most numbers that an axis offers: finer steps gain nothing and make odd sizes."""


@dataclass(frozen=True)
class AxisKind:
    """What an axis counts, in any block."""

    name: str
    """Key in plan files, surveys and records, unique within a block."""
    unit: str
    """Units that leave along the axis, as `--modules` names them."""
    role: str
    """Module to which the axis belongs: the attention or the feed-forward."""
    label: str
    """Plural noun for the number along this axis alone."""
    total: str
    """Plural noun for all units of a model that lie along the axis."""
    outer: tuple[str, ...] = ()
    """Axes that hold this one: so many units lie along it for each of theirs."""
    counts: tuple[str, ...] = ()
    """Attributes of transformers' modules, in any version, that state the number of all units along the axis."""
    counts_each: tuple[str, ...] = ()
    """Attributes that state the number along this axis alone."""
    entries: tuple[str, ...] = ()
    """Attributes that state how many inputs of the output projection all units have."""
    config_keys: Callable[[Family], ConfigKeys] = lambda _: {}
    """Function that returns the config keys of a family for the number along this axis."""
    layer_key: str | None = None
    """Key of the number along this axis alone among the numbers of one layer, where configs have no such key."""
    removable: bool = True
    """Whether units ever leave along the axis, so that `--modules` may name them."""

    def count(self, width: Mapping[str, int]) -> int:
        """Return the number of units of a block; zero in a block without the axis."""
        return math.prod(width[name] for name in (*self.outer, self.name)) if self.name in width else 0


ATTENTION, FEED_FORWARD = ROLES = ("attention", "feed-forward")
"""Roles of modules, in the order in which a block runs them."""
_KINDS: dict[str, AxisKind] = {}


def axis_kind(name: str, unit: str, role: str, label: str, total: str, **facts: Any) -> str:
    """Make an axis known to plans, tables, pages and formats, by its facts as in `AxisKind`; return its name."""
    _KINDS[name] = AxisKind(name, unit, role, label, total, **facts)
    return name


@cache
def load_units() -> None:
    """Import every file of `secateur.model.units`, each of which makes its axes known."""
    import_modules("secateur.model.units")


@cache
def axis_kinds() -> dict[str, AxisKind]:
    """Return all kinds of axes by name, those of the attention first."""
    load_units()
    return {
        kind.name: kind
        for kind in sorted(_KINDS.values(), key=lambda kind: (ROLES.index(kind.role), kind.unit, kind.name))
    }


@dataclass(frozen=True)
class Axis:
    """Direction along which the tensors of a module can become narrower."""

    name: str
    """Name of its kind, in `axis_kinds`."""
    units: int
    """Number of units in the dense block."""
    min_units: int = 1
    """Smallest number with which the module still works; zero takes the whole module away."""
    step: int = 1
    """Number of units that leave together: one from each group of experts."""
    multiple: int = 1
    """Divisor of every narrower number that kernels ask for."""
    rounded: bool = False
    """Whether `--round` applies: feed-forward widths, not heads or experts."""
    wide: int = 0
    """Dense number from which rounded axes are cut to multiples of 32 unless `--round` says otherwise."""
    locked: bool = False
    """Whether single units cannot leave without changing what the others compute."""

    @property
    def kind(self) -> str:
        """Units that leave along the axis, as `--modules` names them."""
        return axis_kinds()[self.name].unit

    @property
    def label(self) -> str:
        """Plural noun for the number along the axis."""
        return axis_kinds()[self.name].label

    @property
    def removable(self) -> bool:
        """Whether units ever leave along such an axis."""
        return axis_kinds()[self.name].removable

    def numbers(self, multiple: int = 1) -> list[int]:
        """Return the numbers that a plan may choose, the dense one first, zero left out.

        Args:
            multiple: the value of `--round`, which rounded axes follow.
        """
        return self._stepped(self.stride(multiple))

    def all_numbers(self, multiple: int = 1) -> list[int]:
        """Return the same without the limit of `LEVELS`."""
        return self._stepped(math.lcm(multiple, self.multiple))

    def _stepped(self, step: int) -> list[int]:
        if self.locked:
            return [self.units]
        if self.rounded:
            return [self.units, *range((self.units - 1) // step * step, 0, -step)]
        return list(range(self.units, self.min_units - 1, -self.step))

    def supports(self, number: int) -> bool:
        """Return whether the module works with a number: any of rounded axes, whatever is offered."""
        return 0 < number <= self.units if self.rounded else number in self.numbers()

    @property
    def range(self) -> str:
        """The numbers that the module works with, in words."""
        least, most = (1, self.units) if self.rounded else (min(self.numbers()), self.units)
        return f"{least} to {most}" if least < most else str(most)

    def stride(self, multiple: int) -> int:
        """Return the distance between offered numbers: a power of two times the multiple, at most `LEVELS` of them."""
        least = math.lcm(multiple, self.multiple)
        return least * 2 ** max(0, math.ceil(math.log2(self.units / least / LEVELS)))


class Width(Mapping[str, int]):
    """Number of units that a block keeps along each of its axes; immutable and hashable.

    Example:
        >>> width = Width({"kv_groups": 3, "heads_per_group": 4, "channels": 1536})
        >>> width.heads
        12
        >>> width | {"kv_groups": 2}
        Width({'kv_groups': 2, 'heads_per_group': 4, 'channels': 1536})
    """

    __slots__ = ("_numbers",)

    def __init__(self, numbers: Mapping[str, int]):
        self._numbers = dict(numbers)

    def __getitem__(self, axis: str) -> int:
        return self._numbers[axis]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __hash__(self) -> int:
        return hash(frozenset(self._numbers.items()))

    def __repr__(self) -> str:
        return f"Width({self._numbers})"

    def __or__(self, numbers: Mapping[str, int]) -> Width:
        """Return this width with other numbers along some axes."""
        return Width(self._numbers | dict(numbers))

    # Shorthands for formats that spell one width at a time.
    @property
    def groups(self) -> int:
        """KV groups."""
        return self.get("kv_groups", 0)

    @property
    def per_group(self) -> int:
        """Query heads in each KV group."""
        return self.get("heads_per_group", 0)

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.groups * self.per_group

    @property
    def experts(self) -> int:
        """Experts; zero in blocks without any."""
        return self.get("experts", 0)

    @property
    def channels(self) -> int:
        """Channels of the feed-forward, or of each expert."""
        return self.get("expert_channels" if "experts" in self else "channels", 0)

    @property
    def fed(self) -> int:
        """Units of the feed-forward: experts or channels."""
        return self.experts or self.channels

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of units of the modules, by the first axis of each."""
        first: dict[str, str] = {}
        for axis in self:
            first.setdefault(axis_kinds()[axis].role, axis_kinds()[axis].unit)
        return tuple(first.values())

    def taking(self, kind: str, other: Width) -> Width:
        """Return this width with the numbers of another one along the axes of one module."""
        role = next(one.role for one in axis_kinds().values() if one.unit == kind)
        return self | {axis: number for axis, number in other.items() if axis_kinds()[axis].role == role}

    def without_experts(self, channels: int) -> Width:
        """Return the width of a block with the same attention, and channels in place of experts."""
        kept = {axis: number for axis, number in self.items() if axis_kinds()[axis].role == ATTENTION}
        return Width(kept | {"channels": channels})

    def product(self, axes: Iterable[str]) -> int:
        """Return the number of units that lie along several nested axes, such as heads in all KV groups."""
        return math.prod(self[axis] for axis in axes)


def present(widths: Iterable[Width]) -> list[AxisKind]:
    """Return the kinds of axes that at least one block has, in the order of `axis_kinds`."""
    names = {name for width in widths for name in width}
    return [kind for name, kind in axis_kinds().items() if name in names]


def model_width(widths: Iterable[Width]) -> Width:
    """Return the number along each axis that any block has: that of the first block with the axis."""
    numbers: dict[str, int] = {}
    for width in widths:
        numbers = {**width, **numbers}
    return Width(numbers)


def totals(widths: Iterable[Width]) -> dict[str, int]:
    """Return how many units lie along each axis in all blocks, by plural noun; axes that no block has are left out."""
    widths = list(widths)
    return {kind.total: sum(map(kind.count, widths)) for kind in present(widths)}


def shares(width: Width, dense: Width) -> dict[str, float]:
    """Return the share of its units that each module of a block keeps; 1 where the dense module has none."""
    found: dict[str, float] = {}
    for axis, full in dense.items():
        role = axis_kinds()[axis].role
        found[role] = found.get(role, 1.0) * (width[axis] / full if full else 1.0)
    return found


def alike(widths: Iterable[Mapping[str, int]]) -> bool:
    """Return whether blocks have one width: along each axis the same number in all blocks that have the axis."""
    seen: dict[str, int] = {}
    return all(seen.setdefault(axis, number) == number for width in widths for axis, number in width.items())
