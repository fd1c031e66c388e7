"""Qwen's families: dense, with experts, and with linear attention in most blocks; and its decoders in multimodal
models."""

from dataclasses import replace
from typing import Any

from secateur.base.errors import SecateurError
from secateur.families.entry import DENSE_HEADS, Entry, Gguf, GgufInput, Stock, Twin, Vllm

OTHERWISE = "serve it with --model-impl transformers, or write it with --format hf"
LINEAR_KEYS = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}
SECTIONS = {"rope.dimension_sections": "mrope_section"}
PARTIAL = Stock(partial_rotary_key="partial_rotary_factor")


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
    token_mixers="linear_attention",
    input=GgufInput(dense=True, keys=SECTIONS, config=_linear_attention),
)

FAMILIES = {
    "qwen2": Entry(
        gguf=Gguf(("qwen2", "llama", "deci")),
        vllm=Vllm(instead_of_fewer_heads=OTHERWISE, stock=_one_window),
    ),
    "qwen3": Entry(gguf=Gguf(("qwen3", "openelm"))),
    "qwen2_moe": Entry(DENSE_HEADS, gguf=Gguf(("qwen2moe",), gating="softmax", input=GgufInput())),
    "qwen3_moe": Entry(
        {"experts": {"number": "num_experts"}}, gguf=Gguf(("qwen3moe",), gating="softmax", input=GgufInput())
    ),
    "qwen3_next": Entry(
        stock=PARTIAL,
        gguf=Gguf(
            ("qwen3next",),
            keys=LINEAR_KEYS,
            token_mixers="linear_attention",
            gating="softmax",
            input=GgufInput(config=_linear_attention),
        ),
    ),
    "qwen3_5_text": Entry(stock=PARTIAL, gguf=QWEN35_GGUF),
    "qwen3_5_moe_text": Entry(
        stock=PARTIAL,
        gguf=replace(
            QWEN35_GGUF,
            architectures=("qwen35moe",),
            gating="softmax",
            gates_sum_to_one=True,
            input=GgufInput(keys=SECTIONS, config=_linear_attention),
        ),
    ),
}

TWINS = {
    "qwen2_vl_text": Twin("qwen2", derives_head_size=True, gguf=Gguf(("qwen2vl",))),
    "qwen2_5_vl_text": Twin("qwen2", derives_head_size=True, gguf=Gguf(("qwen2vl",))),
    "qwen3_vl_text": Twin("qwen3", gguf=Gguf(("qwen3vl",))),
    "qwen3_vl_moe_text": Twin(
        "qwen3_moe", {"norm_topk_prob": True}, inputs_first=True, gguf=Gguf(("qwen3vlmoe",), gating="softmax")
    ),
}
