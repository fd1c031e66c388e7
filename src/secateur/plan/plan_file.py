"""Reader of plan files: a width or the exact units to keep for each block, as `secateur plan` writes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.base.errors import SecateurError
from secateur.base.json_files import parse_json
from secateur.model.axes import Width, axis_kinds
from secateur.model.kinds import KINDS
from secateur.model.structure import Block, KeptUnits
from secateur.model.surgery import width_of
from secateur.plan.unit_lists import read_units

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
            units[index] = read_units(where, block, entry)
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


def _names(block: Block) -> str:
    """Return the kinds of units of a block's modules, for messages."""
    return " and ".join(block.removable_kinds)
