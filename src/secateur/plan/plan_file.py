"""Plans that people write or edit: exact units for each block, or ratios for ranges of blocks."""

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from secateur.base.errors import SecateurError
from secateur.base.json_files import parse_json
from secateur.model.axes import Width
from secateur.model.kinds import KINDS
from secateur.model.structure import Block, KeptUnits, PrunableModule
from secateur.model.surgery import width_of
from secateur.plan.widths import module_widths

KEYS = frozenset({"block", "width", *KINDS, "modules"})
"""What a block's entry may hold; `modules` is what `prune` reports of it."""


def read_plan(path: Path, blocks: Sequence[Block], fingerprint: str) -> tuple[dict[int, Width], dict[int, KeptUnits]]:
    """Widths, and exact units where the file has them: a secateur.json, or what `secateur plan` writes, edited or not.

    Args:
        path: JSON with `blocks`, each with `block` and either `heads` and `channels`, the units to keep, or `width`.
            Blocks left out stay dense.
        blocks: the model's blocks.
        fingerprint: of the model's weights; compared where the file has one.

    Returns:
        The width of every block in the file; and its units, none where the file leaves the choice open.

    Raises:
        SecateurError: it is no plan, one of another model, or its indices repeat or do not exist.
    """
    raw = _read(path)
    entries = raw.get("blocks")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise SecateurError(f"{path}: no plan: it needs a list 'blocks', each with block, heads and channels")
    if raw.get("fingerprint") not in (None, fingerprint):
        raise SecateurError(f"{path}: a plan for another model; remove its fingerprint to use it all the same")
    widths: dict[int, Width] = {}
    units: dict[int, KeptUnits] = {}
    for entry in entries:
        index = entry.get("block")
        if type(index) is not int or not 0 <= index < len(blocks):
            raise SecateurError(f"{path}: block {index} does not exist; the model has blocks 0 to {len(blocks) - 1}")
        if index in widths:
            raise SecateurError(f"{path}: block {index} is there twice")
        unknown = sorted(set(entry) - KEYS)
        if unknown:
            raise SecateurError(
                f"{path}: block {index}: no key '{unknown[0]}' is known; write {', '.join(sorted(KEYS))}"
            )
        if set(KINDS) & set(entry):
            block = blocks[index]
            if wrong := [
                kind for kind in KINDS if kind in entry and not any(m.is_prunable([kind]) for m in block.modules)
            ]:
                raise SecateurError(f"{path}: block {index} has no {wrong[0]}; list its {' and '.join(block.kinds)}")
            kept = {kind: _units(path, index, block, kind, entry.get(kind)) for kind in block.kinds}
            for module in block.modules:
                _check_groups(path, index, module, kept[module.kind])
            if "channels" in entry and block.feed_forward.kind == "experts":
                kept["channels"] = _inner(path, index, block, kept["experts"], entry["channels"])
            units[index], widths[index] = kept, width_of(block, kept)
            if "width" in entry and _numbers(path, index, blocks[index], entry["width"]) != widths[index]:
                raise SecateurError(
                    f"{path}: block {index}: its width is not that of its heads and channels; remove the width, or "
                    "remove both of these from every block to have units chosen"
                )
        else:
            widths[index] = _width(path, index, blocks[index], entry.get("width"))
    if units and len(units) < len(widths):
        bare = next(index for index in widths if index not in units)
        kinds = " and ".join(blocks[bare].kinds)
        raise SecateurError(f"{path}: block {bare} has no {kinds}, as others have; list them everywhere")
    return dict(sorted(widths.items())), dict(sorted(units.items()))


def _numbers(path: Path, index: int, block: Block, given: Any) -> Width:
    """Return the width that an entry spells, whether a plan may have it or not: exact units may leave any."""
    names = [axis.name for axis in block.axes]
    whole = isinstance(given, dict) and all(type(given.get(name)) is int for name in names)
    if not whole or set(given) != set(names):
        raise SecateurError(
            f"{path}: block {index}: list the {' and '.join(block.kinds)} to keep, or give a width of "
            f"{', '.join(names)}"
        )
    return Width(given)


def _width(path: Path, index: int, block: Block, given: Any) -> Width:
    """Return the width that an entry spells, which a plan must be able to have."""
    width, where = _numbers(path, index, block, given), f"{path}: block {index}"
    for module in block.modules:
        if not module.fixed and all(width[name] == 0 for name in module.removed):
            continue
        for axis in module.axes:
            if not axis.supports(width[axis.name]):
                all_gone = "" if module.fixed else ", or 0 along all axes of the module"
                raise SecateurError(
                    f"{where}: {width[axis.name]} {axis.label} cannot be had: {axis.range} are possible{all_gone}"
                )
        narrower = [name for name in module.output_projection.along if width[name] < module.axis(name).units]
        if len(narrower) > 1:
            raise SecateurError(
                f"{where}: a plan narrows one of {' and '.join(narrower)} at a time; keep all of the other"
            )
    return width


def _units(path: Path, index: int, block: Block, kind: str, listed: Any) -> tuple[int, ...]:
    """The kept units of one module, sorted; all of them where the file does not say."""
    count = block.module(kind).units
    if listed is None:
        return tuple(range(count))
    where = f"{path}: block {index}, {kind}"
    found, module = _indices(where, listed, count), block.module(kind)
    if module.locked is not None and len(found) not in ((count,) if module.fixed else (0, count)):
        raise SecateurError(f"{where}: single heads cannot be removed exactly, as {module.locked}; keep all of them")
    if len(found) < module.min_units:
        raise SecateurError(
            f"{where}: a token meets {module.min_units} experts, and {len(found)} are listed; keep more"
        )
    return found


def _inner(path: Path, index: int, block: Block, experts: tuple[int, ...], listed: Any) -> tuple[int, ...]:
    """The kept channels of experts, counted through: as many of each that stays, and of no other but the shared one."""
    module, where = block.feed_forward, f"{path}: block {index}, channels"
    # Those of the shared expert come last.
    found = _indices(where, listed, (module.units + module.shared_multiple) * module.units_inside)
    counts = dict.fromkeys(experts, 0)
    beside = sum(unit >= module.units * module.units_inside for unit in found)
    for unit in found[: len(found) - beside]:
        if (expert := unit // module.units_inside) not in counts:
            raise SecateurError(f"{where}: {unit} is of expert {expert}, which is not kept; remove it")
        counts[expert] += 1
    if len(set(counts.values())) > 1 or not found:
        raise SecateurError(f"{where}: each expert must keep as many as the others, and at least one")
    if beside != (wanted := module.shared_multiple * counts[experts[0]]):
        raise SecateurError(
            f"{where}: the shared expert, whose channels begin at {module.units * module.units_inside}, must keep "
            f"{wanted}, not {beside}"
        )
    return found


def _indices(where: str, listed: Any, count: int) -> tuple[int, ...]:
    """Indices as a file lists them, sorted."""
    if not isinstance(listed, list) or not all(type(unit) is int for unit in listed):
        raise SecateurError(f"{where}: must be a list of indices to keep")
    wrong = [unit for unit in listed if not 0 <= unit < count]
    if wrong:
        raise SecateurError(f"{where}: {wrong[0]} does not exist; the module has 0 to {count - 1}")
    if len(set(listed)) < len(listed):
        twice = next(unit for unit in listed if listed.count(unit) > 1)
        raise SecateurError(f"{where}: {twice} is there twice")
    return tuple(sorted(listed))


def _check_groups(path: Path, index: int, module: PrunableModule, listed: tuple[int, ...]) -> None:
    """Every key/value group that stays must keep the same number of query heads; groups of experts all stay."""
    if module.groups == 1:
        return
    owners = [unit // module.per_group for unit in listed]
    counts = {group: owners.count(group) for group in (range(module.groups) if module.kind == "experts" else owners)}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"group {group} keeps {count}" for group, count in sorted(counts.items()))
        each, none = ("group", "") if module.kind == "experts" else ("key/value group", ", or none")
        raise SecateurError(
            f"{path}: block {index}, {module.kind}: each {each} must keep as many as the others{none} ({said})"
        )


def read_ratios(path: Path, blocks: Sequence[Block], multiple: int) -> dict[int, Width]:
    """Ratios for ranges of blocks: `{"4:20": 0.25, "20:30": {"heads": 0.1, "channels": 0.4}}`, the share that goes.

    Blocks that no range names stay dense. A single ratio counts for both modules; of a mixture, experts then leave, and
    no channels of those that stay.

    Raises:
        SecateurError: it does not parse, ranges overlap or exceed the model, or nothing goes.
    """
    widths: dict[int, Width] = {}
    for key, ratio in _read(path).items():
        match = re.fullmatch(r"(\d+):(\d+)", key)
        first, end = (int(match[1]), int(match[2])) if match else (0, 0)
        if not first < end <= len(blocks):
            raise SecateurError(f"{path}: '{key}' is no range of blocks; write first:end within 0:{len(blocks)}")
        each = isinstance(ratio, dict)
        ratios = ratio if each else dict.fromkeys(KINDS, ratio)
        for kind, share in ratios.items():
            number = isinstance(share, int | float) and not isinstance(share, bool)
            if kind not in KINDS or not number or not 0 <= share <= 1:
                raise SecateurError(
                    f"{path}: {key}: write the share that goes, from 0 to 1, or one each for {', '.join(KINDS)}"
                )
        for index in range(first, end):
            if index in widths:
                raise SecateurError(f"{path}: block {index} is in two ranges")
            mixed = blocks[index].feed_forward.kind == "experts"
            widths[index] = _nearest(blocks[index], ratios | ({} if each or not mixed else {"channels": 0}), multiple)
    if all(width == blocks[index].width for index, width in widths.items()):
        raise SecateurError(f"{path}: nothing goes: no range, or ratios too small to remove a unit")
    return dict(sorted(widths.items()))


def _nearest(block: Block, ratios: dict[str, float], multiple: int) -> Width:
    """Return the width nearest to the ratios along the axes of each kind of unit."""
    found = block.width
    for module in block.modules:
        for kind, axes in groupby(module.axes, key=lambda axis: axis.kind):
            names = [axis.name for axis in axes]
            if share := ratios.get(cast(str, kind), 0.0):
                wanted = block.width.product(names) * (1 - share)
                candidates = _candidates(block, module, names, share, multiple)
                best = min(candidates, key=lambda width: abs(width.product(names) - wanted))
                found |= {name: best[name] for name in names}
    return found


def _candidates(block: Block, module: PrunableModule, names: list[str], share: float, multiple: int) -> list[Width]:
    """Return the widths from which a ratio chooses, the dense one first."""
    if len(names) > 1:
        return module_widths(block, module, multiple, lambda _: None)
    # A multiple too large for the module does not empty it: that is what a ratio of one asks for.
    if share == 1 and not module.fixed:
        return [block.width | module.removed]
    dense, *narrower = module.axis(names[0]).all_numbers(multiple)
    return [block.width | {names[0]: number} for number in (dense, *reversed(narrower))]


def _read(path: Path) -> dict[str, Any]:
    try:
        # Some editors begin a file with a mark.
        raw = parse_json(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise SecateurError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(raw, dict):
        raise SecateurError(f"{path}: must be a JSON object, as secateur.json is")
    return raw
