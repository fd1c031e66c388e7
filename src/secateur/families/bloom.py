"""BigScience's Bloom."""

from collections.abc import Mapping
from typing import Any

from secateur.families.entry import Family, Gguf, Stock


def _repeated_slopes(arguments: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return a block's arguments for a number of rows: the slopes of ALiBi have rows and heads on one axis."""
    slopes = arguments.get("alibi")
    return {**arguments} if slopes is None else {**arguments, "alibi": slopes.repeat(rows, 1, 1)}


ALIBI = "the position bias of a head depends on the index of the head (ALiBi)"
BLOOM = Family(
    blocks="transformer.h",
    attention="self_attention",
    fused="query_key_value",
    interleaved=True,
    output="dense",
    ungrouped=True,
    feed_forward=None,
    up="mlp.dense_h_to_4h",
    gate=None,
    down="mlp.dense_4h_to_h",
    activation="mlp.gelu_impl",
    final_norm="transformer.ln_f",
    heads_locked=ALIBI,
    attention_fixed=True,
    adds_residual=True,
    returns_tuple=True,
    arguments_for_rows=_repeated_slopes,
    stock=Stock(channels_key="ffn_dim", derives_channels=True, head_counts="dense", theta_key=None),
    gguf=Gguf(("bloom",), activation="gelu", epsilon="layer_norm_epsilon"),
)

FAMILIES = {"bloom": BLOOM}
