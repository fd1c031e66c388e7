"""Metadata and scales that only some of llama.cpp's architectures have, one function each.

A function of metadata returns values by keys without the architecture. `gguf_architectures.py` assigns the functions to
architectures.
"""

from typing import Any

from secateur.formats.gguf_model import GgufModel

Values = dict[str, Any]


def head_sizes(model: GgufModel) -> Values:
    """Return the size of heads."""
    return {"attention.key_length": model.dim, "attention.value_length": model.dim}


def latent_sizes(model: GgufModel) -> Values:
    """Return the sizes of latent attention, in which the cache holds a latent vector and the rotated part of a key."""
    config = model.config
    return {
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "attention.q_lora_rank": config.q_lora_rank or None,
    }


def gemma4_sizes(model: GgufModel) -> Values:
    """Return the sizes of heads of Gemma 4, whose blocks with a window have other heads than those without."""
    types = model.config.layer_types
    full, window = (model.blocks[types.index(f"{kind}_attention")].head_dim for kind in ("full", "sliding"))
    return {
        **dict.fromkeys(("attention.key_length", "attention.value_length"), full),
        **dict.fromkeys(("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"), window),
    }


def gemma4_settings(model: GgufModel) -> Values:
    """Return settings of Gemma 4 that files must state even if they are zero."""
    config, full = model.config, gemma4_sizes(model)["attention.key_length"]
    return {
        "rope.dimension_count": full,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        # llama.cpp would cap logits at 30 if the key were missing.
        "final_logit_softcapping": float(config.final_logit_softcapping or 0.0),
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input or 0,
    }


def linear_attention(model: GgufModel) -> Values:
    """Return the distance between blocks of full attention, and the size of linear attention's values."""
    config = model.config
    return {
        "full_attention_interval": model.period,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
    }


def no_windows(_: GgufModel) -> Values:
    """Return nothing: every layer sees all positions."""
    return {}


def regular_windows(model: GgufModel) -> Values:
    """Return the width of windows and the distance between blocks without a window; nothing if no block has a
    window."""
    if model.window is None:
        return {}
    return {"attention.sliding_window": model.window, "attention.sliding_window_pattern": model.period}


def gemma2_windows(model: GgufModel) -> Values:
    """Return the metadata of `regular_windows` for Gemma 2. Its files must state a width; if the model has no windows,
    the width covers all positions."""
    return regular_windows(model) or {"attention.sliding_window": model.config.max_position_embeddings}


def listed_windows(model: GgufModel) -> Values:
    """Return the width of windows, and for each block whether it has one."""
    windows = [kind == "sliding_attention" for kind in model.config.layer_types]
    return {"attention.sliding_window": model.window, "attention.sliding_window_pattern": windows}


def experts_in_every_block(model: GgufModel) -> Values:
    """Return the distance between blocks with experts: one (ERNIE, Llama 4); nothing in a model without experts."""
    return {"interleave_moe_layer_step": None if model.first_experts is None else 1}


def xielu_parameters(model: GgufModel) -> Values:
    """Return the parameters of every block's activation (Apertus)."""
    return {
        f"xielu.{key}": [float(model.checkpoint.read(inside[f"mlp.act_fn.{key}"])) for inside in model.inside]
        for key in ("alpha_n", "alpha_p", "beta", "eps")
    }


def steepest_slope(_: GgufModel) -> Values:
    """Return the largest slope by which attention scores fall with the distance (MPT)."""
    return {"attention.max_alibi_bias": 8.0}


def same_scale(_: GgufModel, __: int) -> float:
    """Return 1: the model and llama.cpp scale attention scores in the same way."""
    return 1.0


def gemma_ratio(model: GgufModel, _: int, *, blocks_of_27b: int) -> float:
    """Return the model's scale of attention scores, divided by llama.cpp's.

    llama.cpp recognises Gemma's 27B model by its number of blocks, `blocks_of_27b`, and scales its scores by
    hidden_size / heads; it scales the scores of the other models by the head size.
    """
    hidden, heads = model.config.hidden_size, model.blocks[0].heads
    assumed = hidden // heads if len(model.blocks) == blocks_of_27b else model.dim
    return float((assumed / model.config.query_pre_attn_scalar) ** 0.5)


def gpt2_ratio(model: GgufModel, index: int) -> float:
    """Return the model's scale of a block's attention scores, divided by llama.cpp's."""
    config = model.config
    ratio = 1.0 if config.scale_attn_weights else float(model.dim**0.5)
    return ratio / (index + 1) if config.scale_attn_by_inverse_layer_idx else ratio
