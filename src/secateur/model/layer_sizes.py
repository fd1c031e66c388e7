"""What follows from a block's numbers of units in its stock layer, as the data that `modeling_secateur.py` reads.

The data is JSON-ready. That file's docstring has the format; `resize` there applies it, to the layers of a written
folder and, by way of `surgery.narrow`, to a block in memory.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

from secateur.model.axes import Width
from secateur.model.structure import Block, Depth2
from secateur.model.units.channels import CHANNELS
from secateur.model.units.experts import EXPERT_CHANNELS, EXPERTS
from secateur.model.units.heads import HEADS, HEADS_PER_GROUP, KV_GROUPS

Axes = list[dict[str, int] | None]
"""For each axis of a tensor the keys that its length is made of, each with a factor; None for an axis that stays."""

QUERY_HEADS, GROUPS, PER_GROUP = "num_attention_heads", "num_key_value_heads", "num_key_value_groups"
"""Config keys of the query heads, the key/value heads and the query heads of each of these."""

BIASES = ("attention_output_bias", "feed_forward_output_bias")
"""Keys that say whether the output projections have a bias that the stock class does not give them."""

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names that configs and modules, in any version of transformers, have for the number of experts."""

COUNTS = {
    HEADS: ("num_attention_heads", "num_heads"),
    (KV_GROUPS,): ("num_key_value_heads", "num_kv_heads"),
    (EXPERTS,): EXPERT_COUNTS,
}
"""Names that modules have for numbers of units, by the axes along which these lie."""

Keys = dict[tuple[str, ...], str]
"""Keys of numbers of units, by the nested axes along which these lie."""

StoredNames = Callable[[int, str], Sequence[str]]
"""Names that the checkpoint has for a block's tensor: one, or one for each matrix that it holds apart."""

IN_MEMORY: Keys = {HEADS: QUERY_HEADS, (KV_GROUPS,): GROUPS, (HEADS_PER_GROUP,): PER_GROUP}
IN_MEMORY |= {(axis,): axis for axis in (CHANNELS, EXPERTS, EXPERT_CHANNELS)}
"""Keys where no config is written; attentions read those of heads."""


def layer_sizes(block: Block, keys: Keys = IN_MEMORY) -> dict[str, Any]:
    """Return how the tensors and attributes of a block follow from its numbers of units.

    Args:
        block: the dense block.
        keys: of its numbers of units; without a key of the KV groups, each head is a group.
    """
    keys = {(KV_GROUPS,): keys[HEADS], **keys}
    sizes: dict[str, Any] = {"shapes": {}, "attributes": {}, "attentions": {}, "feed_forwards": {}}
    attention, feed_forward = block.modules
    if not attention.fixed:
        sizes["attentions"][attention.sink] = keys[HEADS]
    if feed_forward.kind == "channels":
        sizes["feed_forwards"][feed_forward.sink] = keys[(CHANNELS,)]
    for module, bias in zip(block.modules, BIASES, strict=True):
        sizes["shapes"] |= {} if module.locked else _axes(module, block, keys)
        if module.free_bias and module.bias is None:
            width = block.shapes[module.level2.name][1 - module.level2.axis]
            sizes["shapes"][module.bias_name] = [{bias: width}]
    if not attention.locked:
        sizes["attributes"] |= _attributes(HEADS, keys) | _attributes((KV_GROUPS,), keys)
        # GPT-2's fused layer gives queries, keys and values of so many entries each.
        sizes["attributes"] |= {PER_GROUP: {PER_GROUP: 1}, "split_size": {keys[HEADS]: attention.size}}
    if feed_forward.kind == "experts":
        sizes["attributes"] |= _attributes((EXPERTS,), keys)
    return sizes


def model_sizes(
    blocks: Sequence[Block],
    keys: Callable[[Block], Keys],
    stored_names: StoredNames,
    used: Set[str],
) -> dict[str, dict[str, Any]]:
    """Return how the tensors and attributes of all kinds of blocks follow from their numbers of units.

    Tensors have the names of this version of transformers and those of the checkpoint: older versions have the latter.

    Args:
        blocks: all dense blocks.
        keys: gives the keys of a block's numbers of units.
        stored_names: of the checkpoint.
        used: the keys that have several values in the model; what depends on others is left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for index, block in enumerate(blocks):
        for part, entries in layer_sizes(block, keys(block)).items():
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
    return {key: width.product(along) for along, key in keys.items() if width.keys() >= set(along)}


def _axes(module: Depth2, block: Block, keys: Keys) -> dict[str, Axes]:
    """Return for each tensor of a module what its axes are made of; None for an axis that stays."""
    result: dict[str, Axes] = {}
    for slab in module.slabs:
        axes = result.setdefault(slab.name, [None] * len(block.shapes[slab.name]))
        parts, key = axes[slab.axis] or {}, keys[slab.along]
        # Fused layers are several slabs of one axis.
        axes[slab.axis] = parts | {key: parts.get(key, 0) + slab.size}
    return result


def _attributes(along: tuple[str, ...], keys: Keys) -> dict[str, dict[str, int]]:
    return {name: {keys[along]: 1} for name in COUNTS[along]}
