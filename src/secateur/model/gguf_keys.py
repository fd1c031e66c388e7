"""Which GGUF files are read here, and what the keys of their metadata mean.

Files of most mixtures of experts are read here, and those of dense models that transformers does not read. What files
of a family do not state themselves is in the family's entry.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import gguf

from secateur.families.entry import Family, GgufInput
from secateur.families.registry import FAMILIES


class Reading(NamedTuple):
    """How a file is read: by which family's entry."""

    model_type: str
    family: Family
    how: GgufInput


@cache
def readings() -> tuple[Reading, ...]:
    """Return all families of which GGUF files are read here."""
    return tuple(
        Reading(name, family, family.gguf.input) for name, family in FAMILIES.items() if family.gguf.input is not None
    )


def read_dense(architecture: str) -> Reading | None:
    """Return how files without experts are read; None where transformers reads them, or nobody."""
    found = (one for one in readings() if one.how.dense and one.how.architecture == architecture)
    return next(found, None)


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
    """Return how a file is read, or None; `biased` where a bias is added to choose experts."""
    if not facts.get("expert_count"):
        return read_dense(architecture)
    found = [one for one in readings() if one.family.experts and one.how.architecture == architecture]
    # Files of models whose choice is biased may leave out that they are no DeepSeek V2.
    said = facts.get("expert_gating_func", None if biased else gguf.ExpertGatingFuncType.SOFTMAX)
    return next((one for one in found if gating_of(one.family) == said), found[-1] if found else None)


def gating_of(family: Family) -> gguf.ExpertGatingFuncType:
    """Return llama.cpp's number of the function that makes gates of a router's logits."""
    assert family.experts is not None
    return gguf.ExpertGatingFuncType[family.experts.gating.upper()]
