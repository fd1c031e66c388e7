"""Which GGUF files are read here, and how, as a table: mixtures of experts, and what transformers does not read itself.

An entry says what files do not say themselves; metadata and shapes of tensors say the rest.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import gguf


@dataclass(frozen=True)
class Reading:
    """How files of one of llama.cpp's architectures are read, as far as they do not say so themselves."""

    model_type: str
    keys: Mapping[str, str] = field(default_factory=dict)
    """Keys of the metadata that must be there, beside the usual ones → the config's."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What the graph has in its code, by the config's keys."""
    gating: str = "sigmoid"
    """What makes gates of a router's logits."""
    pairs: bool = False
    """Consecutive entries of a head rotate together in the file, and not in checkpoints."""
    together: bool = False
    """Checkpoints hold all experts of a block in one tensor ..."""
    turned: bool = False
    """... input first ..."""
    alternating: bool = False
    """... with the outputs of gate and up in turn."""
    mixing: str | None = None
    """What the config's layer_types call blocks without keys."""
    shifted: bool = False
    """Checkpoints hold norms less one."""
    linear: Literal["grouped", "tiled"] | None = None
    """There is linear attention in blocks without keys; its value heads lie group by group, or the first of all groups
    before the second ones."""
    mixed: bool = False
    """Blocks with a window have heads of another size, and the last blocks may attend with what earlier ones keep."""


_LATENT = {"attention.kv_lora_rank": "kv_lora_rank", "rope.dimension_count": "qk_rope_head_dim"}
_SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_LINEAR = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}
_SECTIONS = {"rope.dimension_sections": "mrope_section"}
_GEMMA4 = _WINDOW | {
    "attention.key_length": "global_head_dim",
    "attention.key_length_swa": "head_dim",
    "attention.shared_kv_layers": "num_kv_shared_layers",
    "embedding_length_per_layer_input": "hidden_size_per_layer_input",
    "final_logit_softcapping": "final_logit_softcapping",
}
_NORMED, _AS_THEY_ARE = {"norm_topk_prob": True}, {"norm_topk_prob": False}
_CHUNKS = {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1, "attn_temperature_tuning": True}
_NEXT = Reading(
    "qwen3_next", _LINEAR, _NORMED, gating="softmax", mixing="linear_attention", shifted=True, linear="grouped"
)
_QWEN35 = replace(_NEXT, model_type="qwen3_5_moe_text", keys=_LINEAR | _SECTIONS, linear="tiled")
_GEMMA = Reading("gemma4_text", _GEMMA4, _NORMED, gating="softmax", together=True, mixed=True)

MIXTURES: dict[str, Reading] = {
    "llama": Reading("mixtral", fixed=_NORMED, gating="softmax", pairs=True),
    "qwen2moe": Reading("qwen2_moe", fixed=_AS_THEY_ARE, gating="softmax"),
    "qwen3moe": Reading("qwen3_moe", fixed=_NORMED, gating="softmax"),
    "qwen3next": _NEXT,
    "qwen35moe": _QWEN35,
    "gemma4": _GEMMA,
    "olmoe": Reading("olmoe", fixed=_AS_THEY_ARE, gating="softmax"),
    "granitemoe": Reading("granitemoe", _SCALES, fixed=_NORMED, gating="softmax", pairs=True, together=True),
    "gpt-oss": Reading("gpt_oss", _WINDOW, gating="softmax", together=True, turned=True, alternating=True),
    "glm4moe": Reading("glm4_moe"),
    "dots1": Reading("dots1", fixed={"sliding_window": None}),
    "hunyuan-moe": Reading("hunyuan_v1_moe", fixed=_NORMED, gating="softmax"),
    "ernie4_5-moe": Reading("ernie4_5_moe", fixed=_NORMED, gating="softmax"),
    "deepseek2": Reading("deepseek_v3", _LATENT),
    "mistral4": Reading("mistral4", _LATENT, gating="softmax", together=True),
    "lfm2moe": Reading("lfm2_moe", {"shortconv.l_cache": "conv_L_cache"}, fixed=_NORMED, mixing="conv"),
    "minimax-m2": Reading("minimax_m2", fixed=_NORMED),
    "llama4": Reading("llama4_text", fixed=_CHUNKS, together=True, turned=True),
    "exaone-moe": Reading("exaone_moe", _WINDOW),
}
"""By llama.cpp's name; `llama` and `gemma4` where they have experts."""
SOFTMAX = {"deepseek2": Reading("deepseek_v2", _LATENT, gating="softmax")}
"""The same name where gates are made otherwise."""
DENSE: dict[str, Reading] = {"qwen35": replace(_QWEN35, model_type="qwen3_5_text", fixed={}), "gemma4": _GEMMA}
"""What is read here without experts as well; transformers reads the others."""

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
"""The usual keys → the config's."""
NEEDED = ("context_length", "embedding_length", "attention.head_count", "attention.layer_norm_rms_epsilon")
DEFAULTS = {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "clip_qkv": None}
"""What llama.cpp takes where a file says nothing."""
UNNAMED = frozenset({"head_dim", "global_head_dim", "num_global_key_value_heads"})
"""What some classes take without having an attribute of that name."""
ROTATION = frozenset({"mrope_section"})
"""What stands among a config's settings of the rotation."""
ELSEWHERE = re.compile(
    r"vocab_size|block_count|nextn_predict_layers|leading_dense_block_count|interleave_moe_layer_step|"
    r"feed_forward_length|full_attention_interval|ssm\.inner_size|"
    r"expert_(count|used_count|shared_count|feed_forward_length|shared_feed_forward_length|gating_func)|"
    r"attention\.(layer_norm_rms_epsilon|sliding_window_pattern|value_length|(key|value)_length_mla|q_lora_rank|"
    r"temperature_(scale|length)|recurrent_layers)|"
    r"rope\.(dimension_count|freq_base|scale_linear|scaling\.(type|factor|attn_factor|original_context_length|finetuned|"
    r"yarn_(beta_fast|beta_slow|log_multiplier)))|tensor_data_layout"
)
"""Keys that are read one by one, or follow from the tensors."""
OF_WINDOWS = re.compile(r"attention\.value_length_swa|rope\.(dimension_count|freq_base)_swa")
"""The same where blocks with a window are others."""


def reading_of(architecture: str, facts: Mapping[str, Any], *, biased: bool) -> Reading | None:
    """The entry for a file, or None; `biased` where something is added to choose experts."""
    if not facts.get("expert_count"):
        return DENSE.get(architecture)
    # Files of models whose choice is biased may leave out that they are no DeepSeek V2.
    softmax = gguf.ExpertGatingFuncType.SOFTMAX
    said = facts.get("expert_gating_func", None if biased else softmax)
    return SOFTMAX.get(architecture) if said == softmax and architecture in SOFTMAX else MIXTURES.get(architecture)
