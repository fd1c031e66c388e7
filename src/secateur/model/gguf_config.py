"""The config of a GGUF file that secateur reads itself, computed from metadata and tensor shapes.

The shapes of tensors give sizes, their names show which blocks have experts and which layers have biases or norms, and
metadata give the rest. A file with an unknown metadata key is refused, because the key may change what the model
computes.
"""

from collections.abc import Mapping
from typing import Any

from gguf import GGUFReader
from transformers import AutoConfig

from secateur.base.errors import SecateurError
from secateur.families.registry import FAMILIES
from secateur.model.gguf_file import GgufFile
from secateur.model.gguf_keys import (
    DEFAULTS,
    GATES_SUM_TO_ONE,
    KEYS,
    READ_ELSEWHERE,
    REQUIRED,
    ROTARY,
    UNDECLARED,
)
from secateur.model.gguf_rope import read_family_rope
from secateur.model.gguf_transformers import complete_config

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
    _check_gating(file)
    default = AutoConfig.for_model(kind)
    values = {**_stated(file, default), **_constants(file), **_computed(file)}
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


def _keys(file: GgufFile) -> dict[str, str]:
    """Return the metadata keys that files of this family must have, with the config keys of the same values."""
    return {**FAMILIES[file.reading.model_type].gguf.keys, **file.reading.input.keys}


def _check_keys(file: GgufFile) -> None:
    """Raise `SecateurError` for a metadata key that is unknown or missing, or whose value is too large."""
    metadata, own = file.metadata, _keys(file)
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


def _check_gating(file: GgufFile) -> None:
    """Raise `SecateurError` if the file computes gates from the router's logits by another function than the family's
    class."""
    if (experts := file.reading.family.experts) is None:
        return
    gating = file.reading.gating
    if file.metadata.get("expert_gating_func", gating) != gating:
        key = f"{file.architecture}.expert_gating_func"
        raise SecateurError(f"{key} is not {gating:d} ({experts.gating}), which {file.reading.model_type} needs")


def _constants(file: GgufFile) -> dict[str, Any]:
    """Return the config values that are constants in the code of the family's class or of llama.cpp's architecture."""
    experts, reading = file.reading.family.experts, file.reading
    sum_to_one = GATES_SUM_TO_ONE.get(file.architecture)
    if experts is not None and experts.gates_sum_to_one is not None:
        sum_to_one = experts.gates_sum_to_one
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
    keys = {**KEYS, **_keys(file)}
    values = DEFAULTS | {name: metadata[key] for key, name in keys.items() if key in metadata}
    for name, value in values.items():
        free = value if name in ROTARY or _is_key(default, name) else None
        if value not in (constants.get(name, free), DEFAULTS.get(name)):
            raise SecateurError(f"{kind} does not support {name} = {value}, which the metadata state")
    return values


def _computed(file: GgufFile) -> dict[str, Any]:
    """Return the config values that follow from tensors and metadata, under every name that config classes have for
    them."""
    metadata, tensors = file.metadata, file.tensors
    heads = file.common("attention.head_count")
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
        **_windows(file),
        **_experts(file),
        **_token_mixers(file),
        **file.reading.input.config(file),
        "bos_token_id": file.token_id("bos"),
        "eos_token_id": file.token_id("eos"),
        "pad_token_id": file.token_id("padding"),
    }


def _largest(value: Any) -> int:
    """Return a number, or the largest one of a list."""
    return int(max(value)) if isinstance(value, list) else int(value)


def _windows(file: GgufFile) -> dict[str, Any]:
    """Return `layer_types` if some layers have a window; otherwise nothing."""
    types = file.layer_types() if "attention.sliding_window" in file.metadata else []
    return {"layer_types": types} if types else {}


def _token_mixers(file: GgufFile) -> dict[str, Any]:
    """Return `layer_types` and the number of key/value heads if some blocks have a token mixer: those without a key
    layer."""
    if (mixer := file.reading.family.token_mixer) is None:
        return {}
    attends = [f"blk.{index}.attn_k.weight" in file.tensors for index in range(file.blocks)]
    kv_heads = file.metadata.get("attention.head_count_kv", file.metadata["attention.head_count"])
    return {
        "num_key_value_heads": _largest(kv_heads),
        "layer_types": ["full_attention" if attention else mixer.layer_type for attention in attends],
    }


def _experts(file: GgufFile) -> Mapping[str, Any]:
    """Return the config values of a mixture of experts; nothing for a file without experts.

    Raises:
        SecateurError: The metadata state zero experts per token, or more than there are experts.
    """
    names, metadata = file.reading.family.experts, file.metadata
    if names is None or not metadata.get("expert_count"):
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
        names.number: count,
        names.experts_per_token: per_token,
        names.expert_width: channels,
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
