"""Qwen's families: dense, with experts, and with linear attention in most blocks; and its decoders in multimodal
models."""

from dataclasses import replace
from typing import Any

from secateur.base.errors import SecateurError
from secateur.families.entry import Experts, Family, Gguf, GgufInput, Stock, TokenMixer, Twin, Vllm

OTHERWISE = "serve it with --model-impl transformers, or write it with --format hf"
LINEAR = TokenMixer("linear_attn", "out_proj", "linear_attention")
LINEAR_KEYS = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}
SECTIONS = {"rope.dimension_sections": "mrope_section"}
PARTIAL = Stock(partial_rotary_key="partial_rotary_factor")

QWEN3_EXPERTS = Experts(gating="softmax")
QWEN2_EXPERTS = replace(
    QWEN3_EXPERTS,
    shared_expert="shared_expert",
    shared_expert_gate="shared_expert_gate",
    shared_expert_width="shared_expert_intermediate_size",
)


def _one_window(config: Any) -> str | None:
    """Return why vLLM's class for Qwen2 cannot run a config with sliding windows."""
    if len(set(config.layer_types)) > 1 and config.max_window_layers != config.num_hidden_layers:
        return f"its class for qwen2 has a sliding window in all blocks or none; {OTHERWISE}"
    return None


def _linear_attention(file: Any) -> dict[str, int]:
    """Return the size of a value head of linear attention, which a GGUF file states for all heads together.

    Raises:
        SecateurError: The numbers of heads do not fit.
    """
    keys, values = file.metadata["ssm.group_count"], file.metadata["ssm.time_step_rank"]
    if not keys or not values or values % keys:
        raise SecateurError(
            f"its linear attention has {values:,} value heads, not a multiple of its {keys:,} key heads"
        )
    return {"linear_value_head_dim": file.metadata.get("ssm.inner_size", 0) // values}


QWEN35_GGUF = Gguf(
    ("qwen35",),
    keys=LINEAR_KEYS,
    input=GgufInput(dense=True, keys=SECTIONS, config=_linear_attention),
)

FAMILIES = {
    "qwen2": Family(
        gguf=Gguf(("qwen2", "llama", "deci")),
        vllm=Vllm(instead_of_fewer_heads=OTHERWISE, stock=_one_window),
    ),
    "qwen3": Family(gguf=Gguf(("qwen3", "openelm"))),
    "qwen2_moe": Family(
        experts=QWEN2_EXPERTS,
        stock=Stock(head_counts="dense"),
        gguf=Gguf(("qwen2moe",), input=GgufInput()),
    ),
    "qwen3_moe": Family(
        experts=QWEN3_EXPERTS,
        gguf=Gguf(("qwen3moe",), input=GgufInput()),
    ),
    "qwen3_next": Family(
        norm_offset=True,
        token_mixer=LINEAR,
        experts=QWEN2_EXPERTS,
        stock=PARTIAL,
        gguf=Gguf(
            ("qwen3next",),
            keys=LINEAR_KEYS,
            input=GgufInput(config=_linear_attention),
        ),
    ),
    "qwen3_5_text": Family(
        norm_offset=True,
        token_mixer=LINEAR,
        stock=PARTIAL,
        gguf=QWEN35_GGUF,
    ),
    "qwen3_5_moe_text": Family(
        norm_offset=True,
        token_mixer=LINEAR,
        experts=replace(QWEN2_EXPERTS, gates_sum_to_one=True),
        stock=PARTIAL,
        gguf=replace(
            QWEN35_GGUF,
            architectures=("qwen35moe",),
            input=GgufInput(keys=SECTIONS, config=_linear_attention),
        ),
    ),
}

TWINS = {
    "qwen2_vl_text": Twin("qwen2", derives_head_size=True, gguf=Gguf(("qwen2vl",))),
    "qwen2_5_vl_text": Twin("qwen2", derives_head_size=True, gguf=Gguf(("qwen2vl",))),
    "qwen3_vl_text": Twin("qwen3", gguf=Gguf(("qwen3vl",))),
    "qwen3_vl_moe_text": Twin("qwen3_moe", {"norm_topk_prob": True}, inputs_first=True, gguf=Gguf(("qwen3vlmoe",))),
}
