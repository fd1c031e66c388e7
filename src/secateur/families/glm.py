"""Z.ai's GLM families."""

from secateur.families.deepseek import DEEPSEEK2, DEEPSEEK_EXPERTS, LATENT
from secateur.families.entry import Family, Gguf, GgufInput, Stock

PARTIAL = Stock(partial_rotary_key="partial_rotary_factor")

FAMILIES = {
    "glm": Family(
        gate=None,
        fused_gate="gate_up_proj",
        stock=PARTIAL,
        gguf=Gguf(("chatglm",), interleaved_rope=True),
    ),
    "glm4": Family(
        gate=None,
        fused_gate="gate_up_proj",
        norm_after_attention="post_self_attn_layernorm",
        norm_after_feed_forward="post_mlp_layernorm",
        norm_before_attention="input_layernorm",
        norm_before_feed_forward="post_attention_layernorm",
        stock=PARTIAL,
        gguf=Gguf(("glm4",), interleaved_rope=True),
    ),
    "glm4_moe": Family(
        experts=DEEPSEEK_EXPERTS,
        stock=PARTIAL,
        gguf=Gguf(("glm4moe",), input=GgufInput()),
    ),
    "glm4_moe_lite": Family(latent=LATENT, experts=DEEPSEEK_EXPERTS, stock=PARTIAL, gguf=DEEPSEEK2),
}
