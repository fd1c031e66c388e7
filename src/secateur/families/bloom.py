"""BigScience's Bloom, and families that were laid out as Bloom at first: TII's Falcon and MosaicML's MPT."""

from typing import Any

from secateur.families.entry import Entry, Gguf, Stock


def _key_value_heads(config: Any) -> int:
    """Return Falcon's number of key/value heads: one in multi-query models, except in the new architecture."""
    return 1 if config.multi_query and not config.new_decoder_architecture else int(config.num_kv_heads)


FAMILIES = {
    "bloom": Entry({"channels_key": "ffn_dim"}, gguf=Gguf(("bloom",), activation="gelu", epsilon="layer_norm_epsilon")),
    "falcon": Entry(
        {"key_value_heads": _key_value_heads, "ungrouped": False, "attention_fixed": True},
        stock=Stock(theta_key=None),
        gguf=Gguf(("falcon",), activation="activation", epsilon="layer_norm_epsilon"),
    ),
    "mpt": Entry({"channels_key": "ffn_dim"}, gguf=Gguf(("mpt",), activation="gelu", epsilon="layer_norm_epsilon")),
}
