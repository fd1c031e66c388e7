"""Google's Gemma families."""

from dataclasses import replace
from typing import Any

from secateur.base.errors import SecateurError
from secateur.families.entry import Entry, Gguf, GgufInput, Stock
from secateur.families.family import Experts, KvSharing

GEMMA_GGUF = Gguf(activation="hidden_activation")
CAP = {"attn_logit_softcapping": "attn_logit_softcapping"}
GEMMA4_KEYS = {
    "attention.sliding_window": "sliding_window",
    "attention.key_length": "global_head_dim",
    "attention.key_length_swa": "head_dim",
    "attention.shared_kv_layers": "num_kv_shared_layers",
    "embedding_length_per_layer_input": "hidden_size_per_layer_input",
    "final_logit_softcapping": "final_logit_softcapping",
}


def _gemma4_sizes(file: Any) -> dict[str, Any]:
    """Return the config values of Gemma 4 that a GGUF file states for blocks with and without a window.

    Raises:
        SecateurError: The file does not have both kinds of blocks.
    """
    types, heads = file.layer_types(), file.common("attention.head_count_kv", file.common("attention.head_count"))
    if {"sliding_attention", "full_attention"} != set(types):
        raise SecateurError("it needs both blocks with a sliding window and blocks without")
    window, full = (types.index(f"{kind}_attention") for kind in ("sliding", "full"))
    tokens, theta = "per_layer_token_embd.weight", file.metadata.get("rope.freq_base", 10000.0)
    per_block = heads if isinstance(heads, list) else [heads] * file.blocks
    first, last = (file.shape(f"blk.{index}.ffn_up.weight")[0] for index in (0, file.blocks - 1))
    return {
        "head_dim": file.metadata["attention.key_length_swa"],
        "num_key_value_heads": per_block[window],
        "num_global_key_value_heads": per_block[full],
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in file.tensors,
        "use_double_wide_mlp": last == 2 * first,
        **({"vocab_size_per_layer_input": file.shape(tokens)[0]} if tokens in file.tensors else {}),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
            "full_attention": {"rope_type": "proportional", "rope_theta": theta},
        },
    }


def _kv_sharing(config: Any, attention: Any) -> KvSharing | None:
    """Return how an attention of Gemma 4 shares keys and values, which its last blocks take from earlier ones."""
    if not config.num_kv_shared_layers:
        return None
    provides_keys = bool(attention.store_full_length_kv)
    if not provides_keys and not attention.is_kv_shared_layer:
        return None
    entries = attention.k_proj.weight.shape[0] if provides_keys else 0
    return KvSharing(attention.layer_type, provides_keys, entries, attention.head_dim)


FAMILIES = {
    "gemma": Entry(gguf=Gguf(("gemma",), difference_inside={"paligemma": "attends to earlier tokens only"})),
    "gemma2": Entry(gguf=replace(GEMMA_GGUF, architectures=("gemma2",), keys=CAP, blocks_of_27b=46)),
    "gemma3_text": Entry(
        stock=Stock(local_theta_key="rope_local_base_freq"),
        gguf=replace(GEMMA_GGUF, architectures=("gemma3",), blocks_of_27b=62),
    ),
    # Blocks take a second input that depends on the tokens, and use the keys of earlier blocks.
    "gemma4_text": Entry(
        {
            "norm_after_attention": "post_attention_layernorm",
            "norm_after_feed_forward": "post_feedforward_layernorm",
            "norm_before_attention": "input_layernorm",
            "norm_before_feed_forward": "pre_feedforward_layernorm",
            "block_multiplier": "layer_scalar",
            "heads_locked": "its blocks with a window have different heads from its blocks with full attention",
            "per_layer_input": "hidden_size_per_layer_input",
            "kv_sharing": _kv_sharing,
            "heads_by_layer_type": True,
            "experts": Experts(
                router="router",
                experts_per_token="top_k_experts",
                parallel_norms=("pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"),
                stacked=True,
            ),
        },
        derived=False,
        stock=Stock(theta_key=None, per_layer_by_type=True),
        gguf=replace(
            GEMMA_GGUF,
            architectures=("gemma4",),
            gating="softmax",
            gates_sum_to_one=True,
            input=GgufInput(
                dense=True,
                keys=GEMMA4_KEYS,
                known_keys=frozenset({"attention.value_length_swa", "rope.dimension_count_swa", "rope.freq_base_swa"}),
                config=_gemma4_sizes,
            ),
        ),
    ),
    "vaultgemma": Entry(),
}
