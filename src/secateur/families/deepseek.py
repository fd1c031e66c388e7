"""DeepSeek's families, and others with its latent attention or its experts."""

from dataclasses import replace
from typing import Any

from secateur.families.entry import Entry, Gguf, GgufInput, Stock


def latent_attention(file: Any) -> dict[str, Any]:
    """Return the sizes of latent attention that a GGUF file states."""
    metadata, rotated = file.metadata, file.metadata["rope.dimension_count"]
    # Older files state the sizes of heads by the keys that newer ones use for latent vectors.
    keys, values = (
        metadata.get(f"attention.{kind}_length_mla", metadata.get(f"attention.{kind}_length"))
        for kind in ("key", "value")
    )
    return {
        "num_key_value_heads": file.common("attention.head_count"),
        "head_dim": rotated,
        "q_lora_rank": metadata.get("attention.q_lora_rank"),
        "qk_nope_head_dim": keys - rotated,
        "v_head_dim": values,
        "topk_method": "greedy" if metadata.get("expert_group_count", 1) == 1 else "group_limited_greedy",
    }


LATENT_KEYS = {"attention.kv_lora_rank": "kv_lora_rank"}
LATENT_INPUT = GgufInput(keys={"rope.dimension_count": "qk_rope_head_dim"}, config=latent_attention)
DEEPSEEK2 = Gguf(("deepseek2",), keys=LATENT_KEYS, gating="sigmoid")

FAMILIES = {
    "deepseek_v2": Entry(gguf=replace(DEEPSEEK2, gating="softmax", gates_sum_to_one=False, input=LATENT_INPUT)),
    "deepseek_v3": Entry(gguf=replace(DEEPSEEK2, input=LATENT_INPUT)),
    "dots1": Entry(gguf=Gguf(("dots1",), gating="sigmoid", input=GgufInput(fixed={"sliding_window": None}))),
    "solar_open": Entry(
        stock=Stock(partial_rotary_key="partial_rotary_factor"), gguf=Gguf(("glm4moe",), gating="sigmoid")
    ),
    "youtu": Entry(gguf=replace(DEEPSEEK2, gating=None)),
}
