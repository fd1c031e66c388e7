"""LG's EXAONE families."""

from dataclasses import replace

from secateur.families.deepseek import DEEPSEEK_EXPERTS
from secateur.families.entry import Family, Gguf, GgufInput

FAMILIES = {
    "exaone4": Family(
        norm_after_attention="post_attention_layernorm",
        norm_after_feed_forward="post_feedforward_layernorm",
        gguf=Gguf(("exaone4",)),
    ),
    "exaone_moe": Family(
        experts=replace(
            DEEPSEEK_EXPERTS,
            number="num_experts",
            renamed=(("gate.e_score_correction", "e_score_correction"),),
        ),
        gguf=Gguf(
            ("exaone-moe",),
            keys={"attention.sliding_window": "sliding_window"},
            input=GgufInput(),
        ),
    ),
}
