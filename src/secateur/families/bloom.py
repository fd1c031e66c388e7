"""BigScience's Bloom."""

from secateur.families.entry import Family, Gguf, Stock

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
    repeated=("alibi",),
    stock=Stock(channels_key="ffn_dim", derives_channels=True, head_counts="dense", theta_key=None),
    gguf=Gguf(("bloom",), activation="gelu", epsilon="layer_norm_epsilon"),
)

FAMILIES = {"bloom": BLOOM}
