"""Token mixers in the attention's place, which are never pruned: linear attention or a convolution.

A block with a token mixer has no query heads. The mixer is one unit, so that every module of a block has a unit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.model.axes import ATTENTION, Axis, axis_kind
from secateur.model.structure import PrunableModule
from secateur.model.units.layers import output_projection
from secateur.model.units.registry import describes

if TYPE_CHECKING:
    from secateur.families.entry import Family

TOKEN_MIXERS = axis_kind("token_mixers", "token_mixers", ATTENTION, "token mixers", "token mixers", removable=False)
REASON = "a token mixer stands in the attention's place"


@describes(ATTENTION, rank=3)
def token_mixer(_: Any, family: Family, layer: Any) -> PrunableModule | None:
    """Describe a token mixer; None if the block has an attention."""
    if family.token_mixer is None or not hasattr(layer, family.token_mixer.path):
        return None
    path = family.token_mixer.path
    slab, bias = output_projection(layer, f"{path}.{family.token_mixer.output}", (TOKEN_MIXERS,), 1)
    axes = (Axis(TOKEN_MIXERS, 1, locked=True),)
    return PrunableModule("token_mixers", axes, (), slab, bias, path, None, locked=REASON, fixed=True)
