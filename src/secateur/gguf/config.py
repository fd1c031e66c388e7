"""The config of a GGUF file, computed from its metadata and the shapes of its tensors.

`read_config` returns the config of a file that secateur reads itself. The shapes of tensors give sizes, their names
show which blocks have experts and which layers have biases or norms, and metadata give the rest. A file with an unknown
metadata key is refused, because the key may change what the model computes. Metadata keys are named here without the
architecture; keys that only some families have are in the family's entry, as `Gguf.keys` and `GgufInput.keys`.

`complete_config` completes the config of a file that transformers reads. transformers leaves out some rotary settings,
windows, scales and softcaps, without which the model computes something else.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import GGUFReader
from transformers import AutoConfig

from secateur.base.errors import SecateurError
from secateur.families.entry import Entry
from secateur.families.registry import FAMILIES
from secateur.gguf.file import GgufFile, metadata_of
from secateur.gguf.positions import FACTORS, layer_types, read_family_rope, read_rope

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


_SIZES = ("attention.key", "rope.dimension_count", "ssm.")
"""Beginnings of metadata keys whose value is the size of a dimension of some tensor. It must not be larger than the
largest dimension of all tensors."""


def read_config(file: GgufFile, reader: GGUFReader) -> Any:
    """Return the config of a file.

    Raises:
        SecateurError: A metadata key is unknown or missing, or has a value that the model's class does not support.
    """
    kind = file.reading.model_type
    _check_keys(file)
    if file.reading.gguf.gating is not None:
        gating = file.reading.gating
        if file.metadata.get("expert_gating_func", gating) != gating:
            key = f"{file.architecture}.expert_gating_func"
            raise SecateurError(f"{key} is not {gating:d} ({file.reading.gguf.gating}), which {kind} needs")
    default = AutoConfig.for_model(kind)
    values = {**_stated(file, default), **_constants(file), **_computed(file, default)}
    for key in ("num_attention_heads", "num_key_value_heads"):
        if isinstance(values.get(key), list):
            raise SecateurError(f"{kind} has one {key} for all blocks, but the file states a list")
    # The class may change the list in place.
    types = tuple(values.get("layer_types", ()))
    config = AutoConfig.for_model(kind, **{key: value for key, value in values.items() if _is_key(default, key)})
    if types and types != tuple(getattr(config, "layer_types", types)):
        raise SecateurError(f"{kind} cannot have full attention and windows in the order that the file states")
    complete_config(config, reader)
    read_family_rope(config, file.metadata, file.reading.input)
    return config


def _check_keys(file: GgufFile) -> None:
    """Raise `SecateurError` for a metadata key that is unknown or missing, or whose value is too large."""
    metadata, own = file.metadata, file.reading.keys
    known = KEYS.keys() | own.keys() | file.reading.input.known_keys
    # A model with these sizes is built before its shapes are compared with the file's.
    largest = max(int(size) for tensor in file.tensors.values() for size in tensor.shape)
    sizes = (key for key in (*KEYS, "rope.dimension_count", *own) if key.startswith(_SIZES))
    refused = {
        "is not known to secateur": (key for key in metadata if key not in known and not READ_ELSEWHERE.fullmatch(key)),
        "is missing": (key for key in (*REQUIRED, *own) if key not in metadata),
        "is a size that no tensor has": (key for key in sizes if metadata.get(key, 0) > largest),
    }
    for reason, keys in refused.items():
        for key in keys:
            raise SecateurError(f"the metadata key {file.architecture}.{key} {reason}")


def _constants(file: GgufFile) -> dict[str, Any]:
    """Return the config values that are constants in the code of the family's class or of llama.cpp's architecture."""
    reading, sum_to_one = file.reading, GATES_SUM_TO_ONE.get(file.architecture)
    if reading.gguf.gates_sum_to_one is not None:
        sum_to_one = reading.gguf.gates_sum_to_one
    return {**({} if sum_to_one is None else {"norm_topk_prob": sum_to_one}), **reading.input.fixed}


def _is_key(default: Any, key: str) -> bool:
    """Return whether a config class has a key; `default` is the class's default config."""
    return key in UNDECLARED or hasattr(default, key)


def _stated(file: GgufFile, default: Any) -> dict[str, Any]:
    """Return the config values that metadata state.

    Raises:
        SecateurError: The model's class does not support one of these values.
    """
    kind, constants, metadata = file.reading.model_type, _constants(file), file.metadata
    keys = {**KEYS, **file.reading.keys}
    values = DEFAULTS | {name: metadata[key] for key, name in keys.items() if key in metadata}
    for name, value in values.items():
        free = value if name in ROTARY or _is_key(default, name) else None
        if value not in (constants.get(name, free), DEFAULTS.get(name)):
            raise SecateurError(f"{kind} does not support {name} = {value}, which the metadata state")
    return values


def _computed(file: GgufFile, default: Any) -> dict[str, Any]:
    """Return the config values that follow from tensors and metadata, under every name that config classes have for
    them."""
    metadata, tensors = file.metadata, file.tensors
    heads = file.common("attention.head_count")
    types = file.layer_types() if "attention.sliding_window" in metadata else []
    first_up = next((f"blk.{i}.ffn_up.weight" for i in range(file.blocks) if f"blk.{i}.ffn_up.weight" in tensors), None)
    return {
        "num_hidden_layers": file.blocks,
        "vocab_size": file.shape("token_embd.weight")[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "num_attention_heads": heads,
        "num_key_value_heads": file.common("attention.head_count_kv", heads),
        # A file without dense blocks may still state how wide these would be.
        "intermediate_size": file.shape(first_up)[0] if first_up else file.common("feed_forward_length", 0),
        "head_dim": metadata.get("attention.key_length", metadata["embedding_length"] // max(1, _largest(heads))),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": metadata.get("rope.freq_base", 10000.0),
            # Some classes rotate half of a head by default.
            "partial_rotary_factor": 1.0,
        },
        **dict.fromkeys(("rms_norm_eps", "norm_eps"), metadata["attention.layer_norm_rms_epsilon"]),
        **dict.fromkeys(("attention_bias", "qkv_bias"), any(name.endswith("attn_k.bias") for name in tensors)),
        **({"layer_types": types} if types else {}),
        **_experts(file, default),
        **_token_mixers(file),
        **file.reading.input.config(file),
        "bos_token_id": file.token_id("bos"),
        "eos_token_id": file.token_id("eos"),
        "pad_token_id": file.token_id("padding"),
    }


def _largest(value: Any) -> int:
    """Return a number, or the largest one of a list."""
    return int(max(value)) if isinstance(value, list) else int(value)


def _token_mixers(file: GgufFile) -> dict[str, Any]:
    """Return `layer_types` and the number of key/value heads if some blocks have a token mixer: those without a key
    layer."""
    if not (mixers := file.reading.gguf.token_mixers):
        return {}
    attends = [f"blk.{index}.attn_k.weight" in file.tensors for index in range(file.blocks)]
    kv_heads = file.metadata.get("attention.head_count_kv", file.metadata["attention.head_count"])
    return {
        "num_key_value_heads": _largest(kv_heads),
        "layer_types": ["full_attention" if attention else mixers for attention in attends],
    }


def _experts(file: GgufFile, default: Any) -> Mapping[str, Any]:
    """Return the config values of a mixture of experts; nothing for a file without experts.

    Raises:
        SecateurError: The metadata state zero experts per token, or more than there are experts.
    """
    metadata = file.metadata
    if not file.reading.gguf.gating or not metadata.get("expert_count"):
        return {}
    blocks = range(file.blocks)
    dense = [index for index in blocks if f"blk.{index}.ffn_gate_inp.weight" not in file.tensors]
    routed = [index for index in blocks if index not in dense]
    first = routed[0] if routed else 0
    count, _, channels = file.shape(f"blk.{first}.ffn_down_exps.weight")
    shared_name = f"blk.{first}.ffn_down_shexp.weight"
    shared = file.shape(shared_name)[1] if shared_name in file.tensors else 0
    per_token = metadata.get("expert_used_count", 0)
    if not 0 < per_token <= count:
        raise SecateurError(f"its metadata state {per_token:,} experts per token, but there are {count:,} experts")
    return {
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), count),
        **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k"), per_token),
        # A class without dense blocks may have one width.
        "moe_intermediate_size" if hasattr(default, "moe_intermediate_size") else "intermediate_size": channels,
        "enable_moe_block": True,
        "shared_expert_intermediate_size": shared,
        "intermediate_size_mlp": metadata.get("feed_forward_length", 0),
        "mlp_only_layers": dense,
        "moe_layers": routed,
        "mlp_layer_types": ["dense" if index in dense else "sparse" for index in blocks],
        "use_qk_norm": f"blk.{first}.attn_q_norm.weight" in file.tensors,
        "use_expert_bias": f"blk.{first}.exp_probs_b.bias" in file.tensors,
        **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"), first),
        **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), shared // channels),
    }


def complete_config(config: Any, reader: GGUFReader) -> None:
    """Add to a config, in place, what transformers has not read from a file.

    Raises:
        SecateurError: No config can describe the file's rotary settings.
    """
    metadata, gguf = metadata_of(reader), FAMILIES.get(config.model_type, Entry()).gguf
    factors = {
        tensor.name: np.asarray(tensor.data, dtype=np.float64) for tensor in reader.tensors if tensor.name in FACTORS
    }
    # With latent attention, attention.key_length is the size of the latent vector; in Gemma 4 it is the head size of
    # blocks without a window only.
    other_meaning = {"attention.kv_lora_rank", "attention.key_length_swa"} & metadata.keys()
    if "attention.key_length" in metadata and not other_meaning and hasattr(config, "head_dim"):
        config.head_dim = metadata["attention.key_length"]
    for key, name in gguf.not_read_by_transformers.items():
        setattr(config, name, metadata.get(key) or getattr(config, name))
    read_rope(config, metadata, factors)
    if gguf.blocks_of_27b is not None:
        config.layer_types = layer_types(metadata, config.num_hidden_layers) or config.layer_types
        is_27b = config.num_hidden_layers == gguf.blocks_of_27b
        per_head = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = per_head if is_27b else config.head_dim
    for cap in {"attn_logit_softcapping", "final_logit_softcapping"} & metadata.keys():
        setattr(config, cap, metadata[cap] or None)
