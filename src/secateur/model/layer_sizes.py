"""What follows from a block's numbers of units in its stock layer, as the data that `modeling_secateur.py` reads.

The data is JSON-ready. That file's docstring has the format; `resize` there applies it, to the layers of a written
folder and, by way of `surgery.narrow`, to a block in memory.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

from secateur.model.axes import Width, axis_kinds
from secateur.model.structure import Block, PrunableModule
from secateur.model.units.heads import HEADS, HEADS_PER_GROUP, KV_GROUPS

Axes = list[dict[str, int] | None]
"""For each axis of a tensor the keys that its length is made of, each with a factor; None for an axis that stays."""

QUERY_HEADS, GROUPS, PER_GROUP = "num_attention_heads", "num_key_value_heads", "num_key_value_groups"
"""Config keys of the query heads, the key/value heads and the query heads of each of these."""

BIASES = ("attention_output_bias", "feed_forward_output_bias")
"""Keys that say whether the output projections have a bias that the stock class does not give them."""

Keys = dict[tuple[str, ...], str]
"""Keys of numbers of units, by the nested axes along which these lie."""

StoredNames = Callable[[int, str], Sequence[str]]
"""Names that the checkpoint has for a block's tensor: one, or one for each matrix that it holds apart."""

IN_MEMORY: Keys = {HEADS: QUERY_HEADS, (KV_GROUPS,): GROUPS, (HEADS_PER_GROUP,): PER_GROUP}
"""Keys where no config is written: attentions read those of heads, and other axes have their own names."""


def layer_sizes(block: Block, keys: Keys = IN_MEMORY) -> dict[str, Any]:
    """Return how the tensors and attributes of a block follow from its numbers of units.

    Args:
        block: the dense block.
        keys: of its numbers of units; without a key of the KV groups, each head is a group.
    """
    keys = {(KV_GROUPS,): keys[HEADS], **_of_all(block.width, keys)}
    sizes: dict[str, Any] = {"shapes": {}, "attributes": {}, "attentions": {}, "feed_forwards": {}}
    for module, part, bias in zip(block.modules, ("attentions", "feed_forwards"), BIASES, strict=True):
        if not module.fixed:
            sizes[part][module.output_layer] = keys[module.output_projection.along]
        if not module.locked:
            sizes["shapes"] |= _axes(module, block, keys)
            sizes["attributes"] |= _attributes(module, keys)
        if module.may_gain_bias and module.bias is None:
            width = block.shapes[module.output_projection.name][1 - module.output_projection.axis]
            sizes["shapes"][module.bias_name] = [{bias: width}]
    return sizes


def model_sizes(
    blocks: Sequence[Block],
    keys: Keys,
    stored_names: StoredNames,
    used: Set[str],
) -> dict[str, dict[str, Any]]:
    """Return how the tensors and attributes of all kinds of blocks follow from their numbers of units.

    Tensors have the names of this version of transformers and those of the checkpoint: older versions have the latter.

    Args:
        blocks: all dense blocks.
        keys: config keys of the numbers of units of one layer.
        stored_names: of the checkpoint.
        used: the keys that have several values in the model; what depends on others is left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for index, block in enumerate(blocks):
        for part, entries in layer_sizes(block, keys).items():
            known = found.setdefault(part, {})
            for name in [name for name in entries if part == "shapes" and name not in known]:
                stored = stored_names(index, name) if name in block.shapes else ()
                entries = _as_stored(entries[name], [path.partition(f".{index}.")[2] for path in stored]) | entries
            found[part] = entries | known
    return {
        part: {name: own for name, own in entries.items() if not used.isdisjoint(_mentioned(own))}
        for part, entries in found.items()
    }


def _mentioned(parts: Any) -> Iterator[str]:
    """Yield the keys in an entry: a key, the keys with their factors, or a list of such."""
    for part in parts if isinstance(parts, list) else [parts]:
        yield from [part] if isinstance(part, str) else part or ()


def _as_stored(axes: Axes, names: Sequence[str]) -> dict[str, Axes]:
    """Return the axes of a tensor by the names of its matrices in the checkpoint, those of experts as `experts.*`."""
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
    """Return the keys, with the axis's own name where there is none."""
    named = {axis for along in keys for axis in along}
    return keys | {(axis,): axis for axis in width if axis not in named}


def _axes(module: PrunableModule, block: Block, keys: Keys) -> dict[str, Axes]:
    """Return for each tensor of a module what its axes are made of; None for an axis that stays."""
    result: dict[str, Axes] = {}
    for slab in module.slabs:
        axes = result.setdefault(slab.name, [None] * len(block.shapes[slab.name]))
        parts, key = axes[slab.axis] or {}, keys[slab.along]
        # Fused layers are several slabs of one axis.
        axes[slab.axis] = parts | {key: parts.get(key, 0) + slab.size}
    return result


def _attributes(module: PrunableModule, keys: Keys) -> dict[str, dict[str, int]]:
    """Return the attributes, of any part of the block, that state numbers of a module's units."""
    found: dict[str, dict[str, int]] = {}
    for axis in module.axes:
        kind = axis_kinds()[axis.name]
        every, each = keys.get((*kind.outer, axis.name)), keys.get((axis.name,))
        found |= {name: {every: 1} for name in kind.counts if every}
        found |= {name: {each: 1} for name in kind.counts_each if each}
        found |= {name: {every: module.size} for name in kind.entries if every}
    return found
