"""BigScience's Bloom."""

from secateur.families.entry import Family, Gguf, Stock

ALIBI = "the position of a head decides how fast its attention fades"
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
    stock=Stock(channels="ffn_dim", derived=True, heads="dense", theta=None),
    gguf=Gguf(("bloom",), activation="gelu", epsilon="layer_norm_epsilon"),
)

FAMILIES = {"bloom": BLOOM}
