"""The attention's units: query heads, the heads of latent attention, and token mixers, which are never pruned.

Query heads form KV groups. In multi-head latent attention each head is a KV group: all heads share one latent vector
per token, and the layer that computes keys and values from it has rows for each head. A block with a token mixer
(linear attention or a convolution) has no query heads. The mixer is one unit, so that every module has a unit.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from secateur.model.axes import ATTENTION, Axis, axis_kind
from secateur.model.structure import PrunableModule, Slab, describes, input_projection, inputs_first, output_projection

if TYPE_CHECKING:
    from secateur.families.family import Family

HEADS_PER_GROUP = axis_kind(
    "heads_per_group",
    "heads",
    ATTENTION,
    "heads in each KV group",
    "query heads",
    outer=("kv_groups",),
    total_attributes=("num_attention_heads", "num_heads"),
    nested_attributes=("num_key_value_groups",),
    # GPT-2's attention splits the output of its fused layer into queries, keys and values of this many entries each.
    input_attributes=("split_size",),
    config_keys=lambda _: {("kv_groups", "heads_per_group"): ("num_attention_heads",)},
    layer_key="num_key_value_groups",
)
KV_GROUPS = axis_kind(
    "kv_groups",
    "heads",
    ATTENTION,
    "KV groups",
    "KV groups",
    total_attributes=("num_key_value_heads", "num_kv_heads"),
    config_keys=lambda family: {} if family.ungrouped else {("kv_groups",): ("num_key_value_heads",)},
)
HEADS = (KV_GROUPS, HEADS_PER_GROUP)
"""Nested axes along which query heads lie."""


def head_axes(groups: int, heads: int, locked: bool = False) -> tuple[Axis, Axis]:
    """Return the axes of query heads in KV groups."""
    return Axis(KV_GROUPS, groups, locked=locked), Axis(HEADS_PER_GROUP, heads // groups, locked=locked)


@describes(ATTENTION, rank=9)
def attention(config: Any, family: Family, layer: Any) -> PrunableModule | None:
    """Describe an attention with keys and values per head or per KV group; None if the block has none."""
    from secateur.checkpoints.facts import head_dim, key_value_heads

    if not family.has(layer, family.attention, family.fused or family.queries, family.output):
        return None
    heads, groups = config.num_attention_heads, key_value_heads(config)
    path, after = family.attention, family.norm_after(layer, "attention")
    if family.heads_locked is not None:
        return _locked(config, family, layer, family.heads_locked)
    output, bias = output_projection(layer, f"{path}.{family.output}", HEADS, heads)
    projections = _input_projections(family, layer, heads, groups, output.size)
    inside = {*(slab.name for slab in projections), output.name, bias}
    others = {name: value for name, value in layer.get_submodule(path).named_parameters(path) if name not in inside}
    # Query and key norms have one vector for all heads; with one vector for each head, heads are locked.
    differ = any(
        value.numel() not in (1, output.size, head_dim(config)) or re.search(r"\.\d+\.", name)
        for name, value in others.items()
    )
    locked = "its query and key norms differ from head to head" if differ else None
    axes = head_axes(groups, heads, differ)
    return PrunableModule(
        "heads", axes, projections, output, bias, path, after, None, groups, locked, outputs=family.attention_outputs
    )


def _locked(config: Any, family: Family, layer: Any, why: str) -> PrunableModule:
    """Describe an attention that keeps all of its heads or none."""
    from secateur.checkpoints.facts import key_value_heads

    heads, groups, path = config.num_attention_heads, key_value_heads(config), family.attention
    output, bias = output_projection(layer, f"{path}.{family.output}", HEADS, heads)
    # An attention whose keys and values later blocks use cannot be removed.
    sharing = family.sharing(config, layer.get_submodule(path))
    fixed = family.attention_fixed or (sharing is not None and sharing.provides_keys)
    joins = None if family.adds_residual else path
    axes, after = head_axes(groups, heads, True), family.norm_after(layer, "attention")
    return PrunableModule(
        "heads", axes, (), output, bias, joins, after, None, groups, why, fixed=fixed, outputs=family.attention_outputs
    )


def _input_projections(family: Family, layer: Any, heads: int, groups: int, dim: int) -> tuple[Slab, ...]:
    """Return the slabs of the query, key and value layers, which may be fused."""
    path = f"{family.attention}.{family.fused}"
    if family.fused is None:
        return _separate_projections(family, layer, heads, groups)
    each = heads // groups * dim
    if family.interleaved:
        # The queries, the key and the value of one KV group after the other.
        queries = input_projection(layer, path, HEADS, heads, dim, 0, heads // groups, 2 * dim)
        starts, gap = (each, each + dim), each + dim
    else:
        queries = input_projection(layer, path, HEADS, heads, dim)
        starts, gap = (heads * dim, (heads + groups) * dim), 0
    pairs = (input_projection(layer, path, (KV_GROUPS,), groups, dim, start, 1, gap) for start in starts)
    return sum(pairs, queries)


def _separate_projections(family: Family, layer: Any, heads: int, groups: int) -> tuple[Slab, ...]:
    """Return the slabs of separate query, key and value layers, and of attention sinks."""
    path = family.attention
    # The query layer may also have rows of a gate on the head's output.
    found = input_projection(
        layer, f"{path}.{family.queries}", HEADS, heads, _rows(layer, f"{path}.{family.queries}", heads)
    )
    for name in family.head_gates:
        found += input_projection(layer, f"{path}.{name}", HEADS, heads, _rows(layer, f"{path}.{name}", heads))
    for name in (family.keys, family.values):
        found += input_projection(layer, f"{path}.{name}", (KV_GROUPS,), groups, _rows(layer, f"{path}.{name}", groups))
    return found if family.sinks is None else (*found, Slab(f"{path}.{family.sinks}", 0, HEADS, heads, 1))


def _rows(layer: Any, path: str, units: int) -> int:
    """Return the number of outputs of a layer for each unit."""
    linear = layer.get_submodule(path)
    return int(linear.weight.shape[int(inputs_first(linear))]) // units


@describes(ATTENTION, rank=5)
def latent_attention(config: Any, family: Family, layer: Any) -> PrunableModule | None:
    """Describe an attention with a latent vector; None if the block has none."""
    if family.latent is None or not family.has(layer, family.attention, *family.latent):
        return None
    heads, path, (latent_layer, key_value_layer) = config.num_attention_heads, family.attention, family.latent
    both = getattr(layer.get_submodule(path), family.latent_queries, None) is not None
    projections: tuple[Slab, ...] = ()
    for name in (family.latent_queries if both else family.queries, key_value_layer):
        rows = layer.get_submodule(f"{path}.{name}").weight.shape[0] // heads
        projections += input_projection(layer, f"{path}.{name}", HEADS, heads, rows)
    output, bias = output_projection(layer, f"{path}.{family.output}", HEADS, heads)
    after, axes, reads = family.norm_after(layer, "attention"), head_axes(heads, heads), f"{path}.{latent_layer}"
    return PrunableModule(
        "heads",
        axes,
        projections,
        output,
        bias,
        path,
        after,
        None,
        heads,
        outputs=family.attention_outputs,
        input_reader=reads,
    )


TOKEN_MIXERS = axis_kind("token_mixers", "token_mixers", ATTENTION, "token mixers", "token mixers", removable=False)
REASON = "a token mixer stands in the attention's place"


@describes(ATTENTION, rank=3)
def token_mixer(_: Any, family: Family, layer: Any) -> PrunableModule | None:
    """Describe a token mixer; None if the block has an attention."""
    mixer = family.token_mixer
    if mixer is None or not family.has(layer, mixer.path, mixer.marker or mixer.output):
        return None
    slab, bias = output_projection(layer, f"{mixer.path}.{mixer.output}", (TOKEN_MIXERS,), 1)
    axes = (Axis(TOKEN_MIXERS, 1, locked=True),)
    after, values = family.norm_after(layer, "attention"), mixer.outputs
    return PrunableModule(
        "token_mixers", axes, (), slab, bias, mixer.path, after, locked=REASON, fixed=True, outputs=values
    )
