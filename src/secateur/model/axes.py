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

from secateur.base.names import UNITS, find

if TYPE_CHECKING:
    from secateur.families.family import Family

ConfigKeys = Mapping[tuple[str, ...], tuple[str, ...]]
"""Config keys of numbers of units, by the nested axes along which the units lie: first the key that the family's class
reads, then other keys that configs may have for the same number."""

LEVELS = 256
"""Largest number of widths offered along an axis: finer steps gain nothing and give odd sizes."""


@dataclass(frozen=True)
class AxisKind:
    """Kind of axis: the same in all blocks of all models."""

    name: str
    """Key in plan files, surveys and records, unique within a block."""
    unit: str
    """Kind of units along the axis, as in `--modules`."""
    role: str
    """Module to which the axis belongs: the attention or the feed-forward."""
    label: str
    """Plural noun for the number along this axis alone."""
    total: str
    """Plural noun for all units of a model that lie along the axis."""
    outer: tuple[str, ...] = ()
    """Outer axes. The axis counts units in each unit of the outer axes."""
    total_attributes: tuple[str, ...] = ()
    """Attributes of transformers' modules, in any version, with the number of all units along the axis."""
    nested_attributes: tuple[str, ...] = ()
    """Attributes with the number of units in each unit of the outer axes."""
    input_attributes: tuple[str, ...] = ()
    """Attributes with the number of the output projection's inputs of all units."""
    config_keys: Callable[[Family], ConfigKeys] = lambda _: {}
    """Function that returns the config keys of a family for the number along this axis."""
    layer_key: str | None = None
    """Key under which a layer's own config values hold the number of units in each unit of the outer axes, where the
    model's config has no such key."""
    removable: bool = True
    """Whether units can be removed along the axis, so that `--modules` may name them."""

    def count(self, width: Mapping[str, int]) -> int:
        """Return the number of units of a block; zero in a block without the axis."""
        return math.prod(width[name] for name in (*self.outer, self.name)) if self.name in width else 0


ATTENTION, FEED_FORWARD = ROLES = ("attention", "feed-forward")
"""Roles of modules, in the order in which a block runs them."""
_KINDS: dict[str, AxisKind] = {}


def axis_kind(name: str, unit: str, role: str, label: str, total: str, **facts: Any) -> str:
    """Register a kind of axis with the fields of `AxisKind`, and return its name."""
    _KINDS[name] = AxisKind(name, unit, role, label, total, **facts)
    return name


@cache
def load_units() -> None:
    """Import the files of all kinds of units; each registers its axes."""
    for place in UNITS.values():
        find(place)


@cache
def axis_kinds() -> dict[str, AxisKind]:
    """Return all kinds of axes by name, attentions first."""
    load_units()
    return {
        kind.name: kind
        for kind in sorted(_KINDS.values(), key=lambda kind: (ROLES.index(kind.role), kind.unit, kind.name))
    }


def config_keys(family: Family) -> ConfigKeys:
    """Return the config keys of all numbers of units of a family."""
    return {along: keys for kind in axis_kinds().values() for along, keys in kind.config_keys(family).items()}


@dataclass(frozen=True)
class Axis:
    """Axis of one module: a direction along which its tensors can become narrower."""

    name: str
    """Name of its kind, in `axis_kinds`."""
    units: int
    """Number of units in the dense block."""
    min_units: int = 1
    """Smallest number of units with which the module still works. Zero removes the whole module."""
    step: int = 1
    """Number of units that are removed together: one from each group of experts."""
    multiple: int = 1
    """Number by which every narrower number of units must be divisible, because kernels require it."""
    rounded: bool = False
    """Whether `--round` applies: feed-forward widths, not heads or experts."""
    rounds_from: int = 0
    """Smallest dense number of units at which the default of `--round` is 32 instead of 1; for rounded axes."""
    locked: bool = False
    """Whether single units cannot be removed exactly."""

    @property
    def kind(self) -> str:
        """Kind of units along the axis, as in `--modules`."""
        return axis_kinds()[self.name].unit

    @property
    def label(self) -> str:
        """Plural noun for the number along the axis."""
        return axis_kinds()[self.name].label

    @property
    def removable(self) -> bool:
        """Whether units can be removed along such an axis."""
        return axis_kinds()[self.name].removable

    def numbers(self, multiple: int = 1) -> list[int]:
        """Return the numbers of units that a plan may choose: the dense number first; zero is left out.

        Args:
            multiple: The value of `--round`, which rounded axes follow.
        """
        return self.all_numbers(self.stride(multiple))

    def all_numbers(self, multiple: int = 1) -> list[int]:
        """Return the numbers as `numbers` does, without the limit of `LEVELS`."""
        if self.locked:
            return [self.units]
        if self.rounded:
            step = math.lcm(multiple, self.multiple)
            return [self.units, *range((self.units - 1) // step * step, 0, -step)]
        return list(range(self.units, self.min_units - 1, -self.step))

    def supports(self, number: int) -> bool:
        """Return whether the module works with a number of units: any number on rounded axes."""
        return 0 < number <= self.units if self.rounded else number in self.numbers()

    @property
    def range(self) -> str:
        """Numbers of units with which the module works, in words."""
        least, most = (1, self.units) if self.rounded else (min(self.numbers()), self.units)
        return f"{least} to {most}" if least < most else str(most)

    def stride(self, multiple: int) -> int:
        """Return the step between offered numbers: a power of two times the multiple, so that at most `LEVELS` are
        offered."""
        least = math.lcm(multiple, self.multiple)
        return least * 2 ** max(0, math.ceil(math.log2(max(1, self.units) / least / LEVELS)))


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

    # For people who read a summary; code loops over axes.
    @property
    def kv_groups(self) -> int:
        """Number of KV groups; zero in a block without query heads."""
        return self.get("kv_groups", 0)

    @property
    def heads_per_group(self) -> int:
        """Number of query heads per KV group; zero in a block without query heads."""
        return self.get("heads_per_group", 0)

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.kv_groups * self.heads_per_group

    @property
    def experts(self) -> int:
        """Number of experts; zero in a block without experts."""
        return self.get("experts", 0)

    @property
    def channels(self) -> int:
        """Number of channels of the feed-forward, or of each expert."""
        return self.get("expert_channels" if "experts" in self else "channels", 0)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of units of the modules."""
        kinds = (axis_kinds()[axis] for axis in self)
        return tuple(kind.unit for kind in kinds if not kind.outer)

    def product(self, axes: Iterable[str]) -> int:
        """Return the number of units that lie along several nested axes, such as heads in all KV groups."""
        return math.prod(self[axis] for axis in axes)


def present(widths: Iterable[Width]) -> list[AxisKind]:
    """Return the kinds of axes that blocks have and along which units can be removed, in the order of `axis_kinds`."""
    names = {name for width in widths for name in width}
    return [kind for name, kind in axis_kinds().items() if name in names and kind.removable]


def model_width(widths: Iterable[Width]) -> Width:
    """Return the number of units along each axis of any block: the number in the first block with the axis."""
    numbers: dict[str, int] = {}
    for width in widths:
        numbers = {**width, **numbers}
    return Width(numbers)


def totals(widths: Iterable[Width]) -> dict[str, int]:
    """Return the total number of units along each axis in all blocks, by plural noun, for the axes of `present`."""
    widths = list(widths)
    return {kind.total: sum(map(kind.count, widths)) for kind in present(widths)}


def shares(width: Width, dense: Width) -> dict[str, float]:
    """Return the kept share of the units of each module, by role; 1 for a module without units in the dense block."""
    found: dict[str, float] = {}
    for axis, full in dense.items():
        role = axis_kinds()[axis].role
        found[role] = found.get(role, 1.0) * (width[axis] / full if full else 1.0)
    return found


def alike(widths: Iterable[Mapping[str, int]]) -> bool:
    """Return whether blocks have one width: along each axis, the same number in all blocks with the axis."""
    seen: dict[str, int] = {}
    return all(seen.setdefault(axis, number) == number for width in widths for axis, number in width.items())
