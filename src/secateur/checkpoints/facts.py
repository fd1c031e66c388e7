"""Sizes and functions that the description of a model finds in its config or in a loaded block."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from secateur.base.quiet import quiet
from secateur.families.registry import family_of


def head_dim(config: Any) -> int:
    """Return the head size in entries; the most frequent one if blocks differ."""
    with quiet():
        own = None if family_of(config).ungrouped else getattr(config, "head_dim", None)
        return own or config.hidden_size // getattr(config, "num_attention_heads", 1)


def key_value_heads(config: Any) -> int:
    """Return the number of key/value heads of a block; the most frequent one if blocks differ."""
    family = family_of(config)
    if family.key_value_heads is not None:
        return family.key_value_heads(config)
    with quiet():
        own = None if family.ungrouped else getattr(config, "num_key_value_heads", None)
        return int(config.num_attention_heads if own is None else own)


def latent_width(config: Any) -> int | None:
    """Return the number of entries per token in a block's KV cache with latent attention, which does not depend on the
    number of heads; None for other attentions."""
    if family_of(config).latent is None:
        return None
    return int(config.kv_lora_rank + config.qk_rope_head_dim)


def positions_of(config: Any) -> int | None:
    """Return the largest number of positions of a model; None without a limit."""
    return getattr(config, "max_position_embeddings", None)


def multiplier_of(config: Any, layer: nn.Module) -> float:
    """Return the factor by which a loaded block multiplies a module's output before it is added to the residual
    stream."""
    family = family_of(config)
    own = 1.0 if family.block_multiplier is None else float(layer.get_buffer(family.block_multiplier))
    return own if family.residual_multiplier is None else own * float(getattr(config, family.residual_multiplier))


def activation_of(config: Any, layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the activation function of a loaded block's feed-forward."""
    family = family_of(config)
    if family.activation is not None:
        return layer.get_submodule(".".join(filter(None, (family.feed_forward, family.activation))))
    names = ("hidden_activation", "activation_function", "hidden_act")
    # LFM2's config does not name the function.
    return ACT2FN[next((value for name in names if (value := getattr(config, name, None))), "silu")]
