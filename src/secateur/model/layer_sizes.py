"""Sizes of a stock layer's tensors and attributes as functions of its numbers of units: data for
`modeling_secateur.py`.

The data can be stored as JSON. The docstring of `modeling_secateur.py` describes the format; its `resize` applies the
data, to the layers of a written folder and, through `surgery.narrow`, to a block in memory.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

from secateur.checkpoints.config_file import BIASES, GROUPS, PER_GROUP, QUERY_HEADS
from secateur.model.axes import ATTENTION, ROLES, Width, axis_kinds
from secateur.model.structure import Block, PrunableModule
from secateur.model.units.heads import HEADS, HEADS_PER_GROUP, KV_GROUPS

Axes = list[dict[str, int] | None]
"""Sizes of a tensor's dimensions: keys whose numbers, each times a factor, add up to the length; None for a fixed
length."""

Keys = dict[tuple[str, ...], str]
"""Config keys of numbers of units, by the nested axes along which the units lie."""

Pieces = Callable[[int, str], Sequence[str]]
"""Function that returns the checkpoint's names of a block's tensor: one name, or one for each expert's matrix."""

IN_MEMORY: Keys = {HEADS: QUERY_HEADS, (KV_GROUPS,): GROUPS, (HEADS_PER_GROUP,): PER_GROUP}
"""Keys for blocks in memory, where no config is written: attentions read the keys of heads; other axes use their
names."""

BIAS_KEYS = dict(zip(ROLES, BIASES, strict=True))
"""Config keys for a bias that the stock class does not have, by the role of its module."""
_STAND_INS = dict(zip(ROLES, ("attentions", "feed_forwards"), strict=True))
"""Parts of `layer_sizes` that name the output layers of modules which may be removed, by the role of the module."""


def layer_sizes(block: Block, keys: Keys = IN_MEMORY) -> dict[str, Any]:
    """Return the sizes of a block's tensors and attributes as functions of its numbers of units.

    Args:
        block: The dense block.
        keys: Keys of the block's numbers of units; without a key of the KV groups, each head is a group.
    """
    keys = {(KV_GROUPS,): keys[HEADS], **_of_all(block.width, keys)}
    sizes: dict[str, Any] = {"shapes": {}, "attributes": {}, "attentions": {}, "feed_forwards": {}}
    for module in block.modules:
        if not module.fixed:
            part = "bare_attentions" if module.role == ATTENTION and module.outputs == 1 else _STAND_INS[module.role]
            sizes.setdefault(part, {})[module.output_layer] = keys[module.output_projection.along]
        if not module.locked:
            sizes["shapes"] |= _axes(module, block, keys)
            sizes["attributes"] |= _attributes(module, keys)
        if module.may_gain_bias and module.bias is None:
            width = block.shapes[module.output_projection.name][1 - module.output_projection.axis]
            sizes["shapes"][module.bias_name] = [{BIAS_KEYS[module.role]: width}]
    return sizes


def model_sizes(
    blocks: Sequence[Block],
    keys: Keys,
    pieces: Pieces,
    used: Set[str],
) -> dict[str, dict[str, Any]]:
    """Return the sizes of the tensors and attributes of all kinds of blocks as functions of their numbers of units.

    Tensors have two names: one of this version of transformers, and the checkpoint's, which older versions use.

    Args:
        blocks: All dense blocks.
        keys: Config keys of the numbers of units of one layer.
        pieces: Function that returns the checkpoint's names of a tensor.
        used: Keys with several values in the model. Sizes that depend on no such key are left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for index, block in enumerate(blocks):
        for part, entries in layer_sizes(block, keys).items():
            known = found.setdefault(part, {})
            for name in [name for name in entries if part == "shapes" and name not in known]:
                stored = pieces(index, name) if name in block.shapes else ()
                entries = (
                    _sizes_of_pieces(entries[name], [path.partition(f".{index}.")[2] for path in stored]) | entries
                )
            found[part] = entries | known
    return {
        part: {name: own for name, own in entries.items() if not used.isdisjoint(_mentioned(own))}
        for part, entries in found.items()
    }


def _mentioned(parts: Any) -> Iterator[str]:
    """Yield the keys in an entry: one key, keys with factors, or a list of these."""
    for part in parts if isinstance(parts, list) else [parts]:
        yield from [part] if isinstance(part, str) else part or ()


def _sizes_of_pieces(axes: Axes, names: Sequence[str]) -> dict[str, Axes]:
    """Return the sizes of a tensor by the names of its matrices in the checkpoint; matrices of experts are named
    `experts.*`."""
    if len(names) < 2:
        return dict.fromkeys(names, axes)
    # Gate and up of the first expert, then those of the second.
    first = [name.replace(".0.", ".*.", 1) for name in names if ".0." in name]
    rows = {key: size // len(first) for key, size in (axes[1] or {}).items()}
    return {name: [axes[0], rows or None, *axes[2:]] for name in first}


def numbers(width: Width, keys: Keys = IN_MEMORY) -> dict[str, int]:
    """Return a block's numbers of units at a width, by key."""
    return {key: width.product(along) for along, key in _of_all(width, keys).items() if width.keys() >= set(along)}


def _of_all(width: Width, keys: Keys) -> Keys:
    """Return the keys, and the names of the axes that have no key."""
    named = {axis for along in keys for axis in along}
    return keys | {(axis,): axis for axis in width if axis not in named}


def _axes(module: PrunableModule, block: Block, keys: Keys) -> dict[str, Axes]:
    """Return the sizes of each tensor of a module."""
    result: dict[str, Axes] = {}
    for slab in module.slabs:
        axes = result.setdefault(slab.name, [None] * len(block.shapes[slab.name]))
        parts, key = axes[slab.axis] or {}, keys[slab.along]
        # Fused layers are several slabs of one axis.
        axes[slab.axis] = parts | {key: parts.get(key, 0) + slab.size}
    return result


def _attributes(module: PrunableModule, keys: Keys) -> dict[str, dict[str, int]]:
    """Return the attributes of submodules that store numbers of a module's units."""
    found: dict[str, dict[str, int]] = {}
    for axis in module.axes:
        kind = axis_kinds()[axis.name]
        every, each = keys.get((*kind.outer, axis.name)), keys.get((axis.name,))
        found |= {name: {every: 1} for name in kind.total_attributes if every}
        found |= {name: {each: 1} for name in kind.nested_attributes if each}
        found |= {name: {every: module.size} for name in kind.input_attributes if every}
    return found
