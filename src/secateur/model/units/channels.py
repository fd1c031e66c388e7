"""Channels of a dense feed-forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.model.axes import FEED_FORWARD, Axis, axis_kind
from secateur.model.structure import PrunableModule, describes, input_projection, inputs_first, output_projection

if TYPE_CHECKING:
    from secateur.families.family import Family

CHANNELS = axis_kind(
    "channels",
    "channels",
    FEED_FORWARD,
    "channels",
    "feed-forward channels",
    config_keys=lambda family: {("channels",): (family.channels_key, *family.entry.stock.channels_aliases)},
)


@describes(FEED_FORWARD, rank=9)
def feed_forward(_: Any, family: Family, layer: Any) -> PrunableModule | None:
    """Describe a dense feed-forward: the up layer, the gate if there is one, and the down layer; None if the block has
    none."""
    if not family.has(layer, family.feed_forward, family.up, family.fused_gate, family.down):
        return None
    prefix = "" if family.feed_forward is None else f"{family.feed_forward}."
    down = layer.get_submodule(prefix + family.down)
    number = int(down.weight.shape[0 if inputs_first(down) else 1])
    # Up first, as everywhere; in a fused layer the gate's rows come first.
    places = [(family.up, 0), (family.gate, 0)]
    if family.fused_gate is not None:
        places = [(family.fused_gate, number), (family.fused_gate, 0)]
    parts = [(prefix + name, offset) for name, offset in places if name is not None]
    projections = (input_projection(layer, path, (CHANNELS,), number, 1, offset) for path, offset in parts)
    output, bias = output_projection(layer, prefix + family.down, (CHANNELS,), number, 1)
    axes = (Axis(CHANNELS, number, rounded=True, rounds_from=1024),)
    inputs = tuple(slab for slabs in projections for slab in slabs)
    after = family.norm_after(layer, "feed_forward")
    return PrunableModule("channels", axes, inputs, output, bias, family.feed_forward, after)
