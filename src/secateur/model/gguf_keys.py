"""Metadata keys of GGUF files, and the config keys that hold the same values; keys are without the architecture.

Keys that only some families have are in the family's entry, as `Gguf.keys` and `GgufInput.keys`.
"""

import re

KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.clamp_kqv": "clip_qkv",
    "expert_weights_norm": "norm_topk_prob",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
"""Metadata keys that any file may have, with the config keys of the same values."""
REQUIRED = ("context_length", "embedding_length", "attention.head_count", "attention.layer_norm_rms_epsilon")
"""Metadata keys that every file must have."""
DEFAULTS = {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "clip_qkv": None}
"""Values that llama.cpp assumes where a file lacks the key, by config key."""
GATES_SUM_TO_ONE = {
    **dict.fromkeys(("llama", "deci", "ernie4_5-moe", "gemma4", "gpt-oss", "granitemoe", "hunyuan-moe"), True),
    **dict.fromkeys(("lfm2moe", "qwen3moe", "qwen3next", "qwen3vlmoe", "qwen35moe"), True),
    **dict.fromkeys(("llama4", "olmoe", "qwen2moe"), False),
}
"""Whether llama.cpp divides the gates of a token by their sum, for each architecture in whose code this is a constant.
Files of other architectures state it."""
UNDECLARED = frozenset({"head_dim", "global_head_dim", "num_global_key_value_heads"})
"""Config keys that some config classes accept although their default config has no such attribute."""
ROTARY = frozenset({"mrope_section"})
"""Config keys inside `rope_parameters`."""
READ_ELSEWHERE = re.compile(
    r"vocab_size|block_count|nextn_predict_layers|leading_dense_block_count|interleave_moe_layer_step|"
    r"feed_forward_length|full_attention_interval|ssm\.inner_size|"
    r"expert_(count|used_count|shared_count|feed_forward_length|shared_feed_forward_length|gating_func)|"
    r"attention\.(layer_norm_rms_epsilon|sliding_window_pattern|value_length|(key|value)_length_mla|q_lora_rank|"
    r"temperature_(scale|length)|recurrent_layers)|"
    r"rope\.(dimension_count|freq_base|scale_linear|scaling\.(type|factor|attn_factor|original_context_length|finetuned|"
    r"yarn_(beta_fast|beta_slow|log_multiplier)))|tensor_data_layout"
)
"""Metadata keys that other code reads one by one, or whose values follow from the shapes of tensors."""
