"""Entry of one of llama.cpp's architectures: which models it computes, and how its files are laid out.

An architecture is the code by which llama.cpp computes models of one kind. A file names its architecture. The functions
at the beginning return metadata and scales that only some architectures have, by keys without the architecture;
`architectures.py` assigns them to architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from secateur.gguf.model import BlockSizes, GgufModel, filled
from secateur.gguf.positions import Sections

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


def nothing(_: GgufModel) -> Values:
    """Return no metadata."""
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


def mpt_slopes(_: GgufModel) -> Values:
    """Return the largest slope of ALiBi, by which scores decrease with the distance (MPT)."""
    return {"attention.max_alibi_bias": 8.0}


def xielu_parameters(model: GgufModel) -> Values:
    """Return the parameters of every block's activation (Apertus)."""
    return {
        f"xielu.{key}": [float(model.checkpoint.read(inside[f"mlp.act_fn.{key}"])) for inside in model.inside]
        for key in ("alpha_n", "alpha_p", "beta", "eps")
    }


def same_scale(_: GgufModel, __: int) -> float:
    """Return 1: the model and llama.cpp scale attention scores in the same way."""
    return 1.0


def gemma_ratio(model: GgufModel, _: int) -> float:
    """Return the model's scale of attention scores, divided by llama.cpp's; see `Gguf.blocks_of_27b`."""
    hidden, heads = model.config.hidden_size, model.blocks[0].heads
    assumed = hidden // heads if len(model.blocks) == model.source.blocks_of_27b else model.dim
    return float((assumed / model.config.query_pre_attn_scalar) ** 0.5)


def gpt2_ratio(model: GgufModel, index: int) -> float:
    """Return the model's scale of a block's attention scores, divided by llama.cpp's."""
    config = model.config
    ratio = 1.0 if config.scale_attn_weights else float(model.dim**0.5)
    return ratio / (index + 1) if config.scale_attn_by_inverse_layer_idx else ratio


Metadata = Callable[[GgufModel], Mapping[str, Any]]
"""Function that returns metadata of a model, by keys without the architecture. Keys with the value None are not
written."""

Order = Literal["grouped", "tiled"]
"""Order of the value heads of linear attention in a file. `grouped`: all value heads of the first key head, then all of
the second, and so on, as in checkpoints. `tiled`: the first value head of every key head, then the second of every key
head, and so on."""
SCALINGS = frozenset({"default", "dynamic", "linear", "yarn"})
"""Kinds of rotary scaling that most architectures compute."""


@dataclass(frozen=True)
class Architecture:
    """Architecture of llama.cpp. The fields list the differences between the architectures that secateur writes."""

    name: str
    biases: frozenset[str]
    """Layers, by llama.cpp's names, that may have a bias."""
    needs_biases: bool = False
    """Whether all of these biases must be in the file."""
    per_layer: bool = False
    """Whether numbers of heads and channels may differ from block to block."""
    headless: bool = False
    """Whether files leave out the attention of blocks without heads; otherwise such a block keeps one head whose output
    is zero."""
    square: bool = False
    """Whether heads x head size must equal the residual width."""
    ungrouped: bool = False
    """Whether every query head must have its own key/value head."""
    interleaved_rope: bool = False
    """Whether neighbouring entries of a head rotate together (interleaved rotary embeddings), not entries half a head
    apart."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Layers that are one tensor in the file, in the order of their rows, by the name of that tensor."""
    scalings: frozenset[str] = SCALINGS
    """Kinds of rotary scaling."""
    partial: bool = False
    """Whether a part of each head may stay unrotated."""
    windows: Metadata = nothing
    """Metadata of sliding windows; `nothing` if every layer attends to all positions."""
    output: Literal["either", "tied", "stored"] = "either"
    """Output matrix of the model. `tied`: always the embedding. `stored`: always a matrix in the file. `either`: the
    matrix in the file, or the embedding if there is none."""
    activation: Literal["silu", "gelu", "relu2", "xielu"] = "silu"
    epsilon: Literal["layer_norm_rms_epsilon", "layer_norm_epsilon"] = "layer_norm_rms_epsilon"
    """Metadata key of the epsilon of norms."""
    leading_dense: bool = False
    """Whether the first blocks may have a feed-forward although later blocks have experts."""
    linear: Order | None = None
    """Order of the value heads of linear attention, which all blocks but every nth have instead of attention; None
    without linear attention."""
    sections: Sections | None = None
    """Order of the rotary frequencies for time, height and width of a picture; None if all frequencies use the same
    position."""
    attention: Metadata = head_sizes
    """Metadata of head sizes."""
    metadata: Metadata = nothing
    """Metadata that only some architectures have."""
    score_ratio: Callable[[GgufModel, int], float] = same_scale
    """Function that returns the model's scale of a block's attention scores, divided by llama.cpp's."""
    caps_scores: bool = False
    """Whether attention scores are capped (`attn_logit_softcapping`)."""
    clamps: bool = False
    """Whether queries, keys and values may be clipped (`clip_qkv`)."""
    states_routing: bool = False
    """Whether files state how gates are computed although `GATES_SUM_TO_ONE` lists the architecture."""

    def sizes(self, model: GgufModel) -> list[BlockSizes]:
        """Return the sizes of each block in the file, including channels that fill rows, and idle heads."""
        output, blocks = f"{model.layers['attn_output']}.bias", list[BlockSizes]()
        for index, (sizes, inside) in enumerate(zip(model.blocks, model.inside, strict=True)):
            biased = "attn_output" in model.added_biases or output in inside
            # The number of idle heads of a block without heads. llama.cpp reads the size of heads from the first block.
            idle = int(not self.headless or index == 0 or biased)
            channels = sizes.channels
            if channels is not None and not sizes.experts:
                channels = filled(channels, model.storage.block)
            heads, kv_heads = sizes.heads or idle, sizes.kv_heads or idle
            blocks.append(replace(sizes, heads=heads, kv_heads=kv_heads, channels=channels))
        return blocks
