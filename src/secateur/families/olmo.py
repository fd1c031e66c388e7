"""Ai2's OLMo families."""

from dataclasses import replace

from secateur.families.entry import Experts, Family, Gguf, GgufInput, Stock

OLMO2 = Family(
    norm_after_attention="post_attention_layernorm",
    norm_after_feed_forward="post_feedforward_layernorm",
    heads_locked="its query and key norms run across all heads",
    gguf=Gguf(("olmo2",)),
)

FAMILIES = {
    "olmo": Family(gguf=Gguf(("olmo",))),
    "olmo2": replace(OLMO2, stock=Stock(scaling_type_key="type")),
    "olmo3": OLMO2,
    "olmoe": replace(
        OLMO2,
        norm_after_attention=None,
        norm_after_feed_forward=None,
        experts=Experts(expert_width="intermediate_size", gating="softmax"),
        gguf=Gguf(("olmoe",), input=GgufInput()),
    ),
    "flex_olmo": replace(OLMO2, experts=Experts(expert_width="intermediate_size"), gguf=Gguf()),
}
