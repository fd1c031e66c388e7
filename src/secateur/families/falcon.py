"""TII's Falcon, whose oldest models are laid out as Bloom."""

from dataclasses import replace
from typing import Any

from secateur.families.bloom import BLOOM
from secateur.families.entry import Gguf, Stock


def _key_value_heads(config: Any) -> int:
    """Return the number of key/value heads: one in multi-query models, except in the new architecture."""
    return 1 if config.multi_query and not config.new_decoder_architecture else int(config.num_kv_heads)


FAMILIES = {
    "falcon": replace(
        BLOOM,
        ungrouped=False,
        key_value_heads=_key_value_heads,
        feed_forward="mlp",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation="act",
        adds_residual=False,
        repeated=(),
        locked_if="alibi",
        stock=Stock(channels_key="ffn_hidden_size", head_counts="dense", theta_key=None),
        gguf=Gguf(("falcon",), activation="activation", epsilon="layer_norm_epsilon"),
    ),
}
