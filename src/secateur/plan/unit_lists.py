"""Checks of the units to keep that an entry of a plan file lists."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.base.errors import SecateurError
from secateur.model.kinds import KINDS
from secateur.model.structure import Block, KeptUnits, PrunableModule


def read_units(where: str, block: Block, entry: Mapping[str, Any]) -> KeptUnits:
    """Return the units to keep of a block.

    Args:
        where: File and block, for error messages.
        block: The block.
        entry: Lists of indices by kind of units. A module keeps all units if its kind is not in the entry.

    Raises:
        SecateurError: The block has no units of a kind or with an index in the entry, or cannot work with the
            selection.
    """
    for kind in KINDS:
        if kind in entry and kind not in [axis.kind for axis in block.axes]:
            raise SecateurError(f"{where} has no {kind}; list its {' and '.join(block.removable_kinds)}")
    kept: dict[str, tuple[int, ...]] = {}
    for module in block.modules:
        kept[module.kind] = tuple(range(module.units))
        if module.kind in entry:
            kept[module.kind] = _read_module_units(f"{where}, {module.kind}", module, entry[module.kind])
        inside = module.kind_inside
        if inside is not None and inside in entry:
            kept[inside] = _read_units_inside(f"{where}, {inside}", module, kept[module.kind], entry[inside])
    return kept


def _read_module_units(where: str, module: PrunableModule, raw: Any) -> tuple[int, ...]:
    """Return the listed units of one module, sorted."""
    units = _read_indices(where, raw, module.units)
    allowed = {module.units} if module.fixed else {0, module.units}
    if module.locked is not None and len(units) not in allowed:
        raise SecateurError(
            f"{where}: single {module.kind} cannot be removed exactly, because {module.locked}; keep all of them"
        )
    if len(units) < module.min_units:
        raise SecateurError(f"{where}: {len(units)} are listed, but at least {module.min_units} must stay; list more")
    _check_groups(where, module, units)
    return units


def _check_groups(where: str, module: PrunableModule, units: Sequence[int]) -> None:
    """Raise `SecateurError` unless all groups keep the same number of units; KV groups may also lose all heads."""
    nested = len(module.output_projection.along) > 1
    counts = Counter(unit // module.per_group for unit in units)
    sizes = {group: counts[group] for group in range(module.groups) if counts[group] or not nested}
    if len(set(sizes.values())) > 1:
        group, none = ("KV group", ", or none") if nested else (f"group of {module.kind}", "")
        listed = ", ".join(f"group {index} keeps {count}" for index, count in sizes.items())
        raise SecateurError(f"{where}: each {group} must keep the same number of {module.kind}{none} ({listed})")


def _read_units_inside(where: str, module: PrunableModule, outer: Sequence[int], raw: Any) -> tuple[int, ...]:
    """Return the listed channels of experts, sorted.

    Channels are numbered through all experts, expert by expert. The channels of a shared expert come last, if it is
    pruned along with the other experts.

    Args:
        where: File, block and kind of units, for error messages.
        module: The mixture of experts.
        outer: Experts to keep.
        raw: The list in the plan file.
    """
    size, shared_start = module.units_inside, module.units * module.units_inside
    units = _read_indices(where, raw, shared_start + module.shared_multiple * size)
    counts = Counter(unit // size for unit in units if unit < shared_start)
    if removed := sorted(counts.keys() - set(outer)):
        unit = next(unit for unit in units if unit // size == removed[0])
        raise SecateurError(f"{where}: {unit} belongs to expert {removed[0]}, which is not kept; remove it")
    if not units or len({counts[expert] for expert in outer}) > 1:
        raise SecateurError(f"{where}: all experts must keep the same number of channels, and at least one")
    shared, required = len(units) - counts.total(), module.shared_multiple * counts[outer[0]]
    if shared != required:
        raise SecateurError(
            f"{where}: {shared} channels of the shared expert are listed, which begin at {shared_start}; list "
            f"{required} of them"
        )
    return units


def _read_indices(where: str, raw: Any, count: int) -> tuple[int, ...]:
    """Return a list of indices below `count`, sorted."""
    if not isinstance(raw, list) or not all(type(unit) is int for unit in raw):
        raise SecateurError(f"{where}: must be a list of the indices to keep")
    if wrong := [unit for unit in raw if not 0 <= unit < count]:
        raise SecateurError(f"{where}: {wrong[0]} does not exist; use indices from 0 to {count - 1}")
    if repeated := [unit for unit, number in Counter(raw).items() if number > 1]:
        raise SecateurError(f"{where}: {repeated[0]} is listed twice")
    return tuple(sorted(raw))
