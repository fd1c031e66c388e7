"""Token mixers in the attention's place, which are never pruned: linear attention or a convolution.

Such a block has no heads; its axes have the nominal number that the config states for all blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.base.errors import SecateurError
from secateur.model.axes import ATTENTION
from secateur.model.structure import PrunableModule
from secateur.model.units.heads import HEADS, head_axes
from secateur.model.units.layers import output_projection
from secateur.model.units.registry import describes

if TYPE_CHECKING:
    from secateur.families.entry import Family

MIXED = "another kind of layer stands in the attention's place"


@describes(ATTENTION, rank=3)
def token_mixer(config: Any, family: Family, layer: Any) -> PrunableModule | None:
    """Describe a token mixer; None where the block has an attention."""
    from secateur.model.facts import key_value_heads

    if family.token_mixer is None or not hasattr(layer, family.token_mixer.path):
        return None
    heads, groups = config.num_attention_heads, key_value_heads(config)
    path, output = family.token_mixer.path, family.token_mixer.output
    inputs = layer.get_submodule(f"{path}.{output}").weight.shape[1]
    if inputs % heads:
        raise SecateurError(
            f"{config.model_type}: {heads} heads do not divide the {inputs} inputs of {path}.{output}, and no such "
            "model is known"
        )
    slab, bias = output_projection(layer, f"{path}.{output}", HEADS, heads)
    axes = head_axes(groups, heads, locked=True)
    return PrunableModule(
        "heads", axes, (), slab, bias, path, None, None, groups, MIXED, fixed=True, is_token_mixer=True
    )
