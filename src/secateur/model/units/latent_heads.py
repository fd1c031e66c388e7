"""Query heads of multi-head latent attention; each head is a KV group.

All heads share one latent vector per token. The layer that computes keys and values from it has rows for each head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.model.axes import ATTENTION
from secateur.model.structure import PrunableModule, Slab
from secateur.model.units.heads import HEADS, head_axes
from secateur.model.units.layers import input_projection, output_projection
from secateur.model.units.registry import describes

if TYPE_CHECKING:
    from secateur.families.entry import Family


@describes(ATTENTION, rank=5)
def attention(config: Any, family: Family, layer: Any) -> PrunableModule | None:
    """Describe an attention with a latent vector; None if the family has another attention."""
    if family.latent is None:
        return None
    heads, path, (latent_layer, key_value_layer) = config.num_attention_heads, family.attention, family.latent
    both = getattr(layer.get_submodule(path), family.latent_queries, None) is not None
    projections: tuple[Slab, ...] = ()
    for name in (family.latent_queries if both else family.queries, key_value_layer):
        rows = layer.get_submodule(f"{path}.{name}").weight.shape[0] // heads
        projections += input_projection(layer, f"{path}.{name}", HEADS, heads, rows)
    output, bias = output_projection(layer, f"{path}.{family.output}", HEADS, heads)
    after, axes, reads = family.norm_after_attention, head_axes(heads, heads), f"{path}.{latent_layer}"
    return PrunableModule(
        "heads", axes, projections, output, bias, path, after, None, heads, returns_tuple=True, input_reader=reads
    )
