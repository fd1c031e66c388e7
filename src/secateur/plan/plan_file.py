"""Reader of plan files: a width or the exact units to keep for each block, as `secateur plan` writes them."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.base.errors import SecateurError
from secateur.base.json_files import parse_json
from secateur.model.axes import Width, axis_kinds
from secateur.model.kinds import KINDS
from secateur.model.structure import Block, KeptUnits, PrunableModule
from secateur.model.surgery import width_of

KEYS = ("block", "width", *dict.fromkeys(kind.unit for kind in axis_kinds().values()), "modules")
"""Keys of a block's entry. `secateur prune` writes `modules`, which is ignored here."""


def read_plan(path: Path, blocks: Sequence[Block], fingerprint: str) -> tuple[dict[int, Width], dict[int, KeptUnits]]:
    """Read a plan file: a secateur.json, or the output of `secateur plan`, edited or not.

    Args:
        path: JSON file with a list `blocks`. Each entry has the index `block` and either the units to keep, such as
            `heads` and `channels`, or a `width`. Blocks without an entry stay dense.
        blocks: All blocks of the model.
        fingerprint: Fingerprint of the model's weights; compared with the one in the file, if there is one.

    Returns:
        The width of every block in the file; and the units to keep of these blocks, empty if the file has widths only.

    Raises:
        SecateurError: The file is not a plan, belongs to another model, or lists units or widths that the model does
            not have.
    """
    widths: dict[int, Width] = {}
    units: dict[int, KeptUnits] = {}
    for index, entry in _entries(path, len(blocks), fingerprint).items():
        block, where = blocks[index], f"{path}: block {index}"
        if entry.keys().isdisjoint(KINDS):
            widths[index] = _possible_width(where, block, entry.get("width"))
        else:
            units[index] = _read_units(where, block, entry)
            widths[index] = width_of(block, units[index])
            if "width" in entry and _read_width(where, block, entry["width"]) != widths[index]:
                raise SecateurError(
                    f"{where}: 'width' does not match the listed units; remove 'width', or remove the lists of units "
                    "from all blocks"
                )
    if units and (missing := widths.keys() - units.keys()):
        index = min(missing)
        raise SecateurError(
            f"{path}: block {index} has no {_names(blocks[index])}; list them in every block, or in no block"
        )
    return dict(sorted(widths.items())), dict(sorted(units.items()))


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        SecateurError: The file cannot be read, is not JSON, or holds something else.
    """
    try:
        # Some editors write a byte order mark at the beginning of a file.
        raw = parse_json(path.read_text(encoding="utf-8-sig"), unique=True)
    except (ValueError, OSError) as error:
        raise SecateurError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(raw, dict):
        raise SecateurError(f"{path}: must be a JSON object, as secateur.json is")
    return raw


def _entries(path: Path, count: int, fingerprint: str) -> dict[int, dict[str, Any]]:
    """Return the entries of a plan file by index of the block; `count` is the number of blocks of the model."""
    raw = read_json_object(path)
    entries = raw.get("blocks")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise SecateurError(
            f"{path}: not a plan: 'blocks' must be a list of entries, each with block, heads and channels"
        )
    if raw.get("fingerprint") not in (None, fingerprint):
        raise SecateurError(f"{path}: this plan was made for another model; remove 'fingerprint' to use it anyway")
    result: dict[int, dict[str, Any]] = {}
    for entry in entries:
        index = entry.get("block")
        if type(index) is not int:
            raise SecateurError(f"{path}: 'block' is {json.dumps(index)}; it must be a number from 0 to {count - 1}")
        if not 0 <= index < count:
            raise SecateurError(f"{path}: block {index} does not exist; the model has blocks 0 to {count - 1}")
        if index in result:
            raise SecateurError(f"{path}: block {index} has two entries; remove one of them")
        if unknown := sorted(entry.keys() - set(KEYS)):
            raise SecateurError(f"{path}: block {index}: unknown key '{unknown[0]}'; use {', '.join(sorted(KEYS))}")
        result[index] = entry
    return result


def _read_width(where: str, block: Block, raw: Any) -> Width:
    """Return the width in an entry; a plan may not be able to have this width.

    Args:
        where: File and block, for error messages.
        block: The block.
        raw: Value of `width` in the entry.
    """
    names = [axis.name for axis in block.axes if axis.removable]
    fixed = {axis.name: axis.units for axis in block.axes if not axis.removable}
    is_width = isinstance(raw, dict) and all(type(number) is int for number in raw.values())
    if not is_width or (fixed | raw).keys() != {*fixed, *names}:
        raise SecateurError(
            f"{where}: list the {_names(block)} to keep, or give a width with whole numbers for {', '.join(names)}"
        )
    return Width({**fixed, **raw})


def _possible_width(where: str, block: Block, raw: Any) -> Width:
    """Return the width in an entry; raise `SecateurError` if a plan cannot have it."""
    width = _read_width(where, block, raw)
    for module in block.modules:
        if not module.fixed and not any(width[name] for name in module.removed):
            continue
        for axis in module.axes:
            if not axis.supports(width[axis.name]):
                removal = "" if module.fixed else ", or 0 along every axis of the module to remove it"
                raise SecateurError(
                    f"{where}: {width[axis.name]} {axis.label} are not possible; use {axis.range}{removal}"
                )
        narrower = [name for name in module.output_projection.along if width[name] < module.axis(name).units]
        if len(narrower) > 1:
            raise SecateurError(
                f"{where}: the width is narrower along {' and '.join(narrower)}; keep all units along one of them"
            )
    return width


def _read_units(where: str, block: Block, entry: Mapping[str, Any]) -> KeptUnits:
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


def _names(block: Block) -> str:
    """Return the kinds of units of a block's modules, for messages."""
    return " and ".join(block.removable_kinds)
