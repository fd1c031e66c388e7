"""DeepSeek's families, and others with its latent attention or its experts."""

from dataclasses import replace

from secateur.families.entry import Experts, Family, Gguf, GgufInput, Stock

LATENT = ("kv_a_proj_with_mqa", "kv_b_proj")
LATENT_KEYS = {"attention.kv_lora_rank": "kv_lora_rank", "rope.dimension_count": "qk_rope_head_dim"}
DEEPSEEK_EXPERTS = Experts(number="n_routed_experts", groups=("n_group", "topk_group"), shared_expert="shared_experts")
DEEPSEEK2 = Gguf(("deepseek2",))

FAMILIES = {
    "deepseek_v2": Family(
        latent=LATENT,
        experts=replace(DEEPSEEK_EXPERTS, gating="softmax", gates_sum_to_one=False),
        stock=Stock(heads="divisors"),
        gguf=replace(DEEPSEEK2, input=GgufInput("deepseek2", keys=LATENT_KEYS)),
    ),
    "deepseek_v3": Family(
        latent=LATENT,
        experts=DEEPSEEK_EXPERTS,
        gguf=replace(DEEPSEEK2, input=GgufInput("deepseek2", keys=LATENT_KEYS)),
    ),
    "dots1": Family(
        experts=DEEPSEEK_EXPERTS,
        gguf=Gguf(("dots1",), input=GgufInput("dots1", fixed={"sliding_window": None})),
    ),
    "solar_open": Family(
        experts=DEEPSEEK_EXPERTS,
        stock=Stock(channels="moe_intermediate_size", partial="partial_rotary_factor"),
        gguf=Gguf(("glm4moe",)),
    ),
    "youtu": Family(latent=LATENT, gguf=DEEPSEEK2),
}
