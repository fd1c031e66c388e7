"""Requirements of llama.cpp's architectures on a model: whatever else they would compute differently.

A reason is the rest of a sentence that begins with the architecture's name. Functions return whether requirements hold,
by the reason that is given if one does not; errors list the reasons in this order.
"""

from collections.abc import Callable, Mapping
from typing import Any

from secateur.gguf.architecture import Architecture, listed_windows, nothing
from secateur.gguf.config import GATES_SUM_TO_ONE
from secateur.gguf.model import GgufModel
from secateur.gguf.positions import rope_kind, rope_of, window_rope_of
from secateur.model.axes import ROLES, axis_kinds

ACTIVATIONS = {
    "silu": {"silu", "swish"},
    "relu2": {"relu2"},
    "xielu": {"xielu"},
    "gelu": {"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"},
}
"""transformers' names of activations, by llama.cpp's name. llama.cpp's gelu differs from the exact one by less than
0.001."""
Holds = dict[str, Any]
"""Whether requirements hold, by the reason that is given if one does not."""


def unmet(model: GgufModel, architecture: Architecture) -> list[str]:
    """Return the reasons why an architecture does not compute a model."""
    own = REQUIREMENTS.get(architecture.name, lambda *_: {})
    holds = {
        **_experts(model, architecture),
        **_layers(model, architecture),
        **_positions(model, architecture),
        **_attention_and_output(model, architecture),
        **own(model, model.config),
    }
    return [reason for reason, met in holds.items() if not met]


def _experts(model: GgufModel, architecture: Architecture) -> Holds:
    experts = [bool(sizes.experts) for sizes in model.blocks]
    mixers = {model.is_token_mixer(index) for index in range(len(model.blocks))}
    in_order = {
        "needs an attention and a feed-forward in every block": all(
            {axis_kinds()[axis].role for axis in width} == {*ROLES} for width in model.widths
        ),
        # llama.cpp aborts without either.
        "needs blocks with attention, and blocks with a convolution or linear attention": (
            not model.source.token_mixers or len(mixers) == 2
        ),
        "needs experts in all blocks after the first ones": (
            not architecture.leading_dense or experts == sorted(experts)
        ),
        "needs experts in all blocks or in none": architecture.leading_dense or len(set(experts)) == 1,
    }
    if not any(experts):
        return in_order
    numbers = {(sizes.experts, sizes.expert_channels) for sizes in model.blocks if sizes.experts}
    per_token = getattr(model.config, model.experts.experts_per_token)
    divides = GATES_SUM_TO_ONE.get(architecture.name)
    what = "divides" if divides else "does not divide"
    return in_order | {
        "needs the same number of experts, and of channels of each, in all blocks with experts": len(numbers) == 1,
        "needs the same number of experts per token in all blocks": (
            not isinstance(per_token, list) or len(set(per_token)) == 1
        ),
        f"{what} the gates of experts by their sum, unlike this model": divides in (None, model.gates_sum_to_one),
    }


def _layers(model: GgufModel, architecture: Architecture) -> Holds:
    first, hidden = model.blocks[0], model.config.hidden_size
    activation = getattr(model.config, model.source.activation, model.source.activation)
    extra = model.biases - architecture.biases
    return {
        "needs as many key/value heads as query heads": not architecture.ungrouped or first.kv_heads == first.heads,
        f"needs heads x head size = {hidden}, so all {hidden // model.dim} heads": (
            not architecture.square or first.heads * model.dim == hidden
        ),
        f"computes {architecture.activation}, not {activation}": activation in ACTIVATIONS[architecture.activation],
        f"has no place for the biases of {', '.join(sorted(extra))}": not extra,
    }


def _positions(model: GgufModel, architecture: Architecture) -> Holds:
    kind, rope, windows = rope_kind(model.config), rope_of(model.config), window_rope_of(model.config)
    by_distance = model.window is not None and architecture.windows not in (nothing, listed_windows)
    return {
        f"does not support {kind} rotary scaling": kind in architecture.scalings,
        "rounds the limits of yarn; set truncate to true in config.json to prune the model as llama.cpp computes it": (
            kind != "yarn" or rope.get("truncate", True)
        ),
        "does not scale the rotation of layers with a window": windows.get("rope_type", "default") == "default",
        f"rotates whole heads, but {model.rotated} of {model.dim} entries rotate here": (
            model.rotated == model.dim or architecture.partial
        ),
        f"rotates entries of a head in pairs, but {model.rotated} rotate here": model.rotated % 2 == 0,
        "supports windows only where blocks without a window lie at regular distances": (
            not by_distance or model.period
        ),
    }


def _attention_and_output(model: GgufModel, architecture: Architecture) -> Holds:
    def lacks(key: str) -> bool:
        return not getattr(model.config, key, None)

    ahead = getattr(model.config, "use_bidirectional_attention", None)
    return {
        "has no norms of queries and keys, which this model has": lacks("qk_layernorm"),
        "has no place for the biases of convolutions": lacks("conv_bias"),
        "uses the embedding as its output matrix, and this model has another one (tie_word_embeddings)": (
            architecture.output != "tied" or model.config.tie_word_embeddings
        ),
        "does not cap attention scores, which this model does": (
            architecture.caps_scores or lacks("attn_logit_softcapping")
        ),
        "does not clip queries, keys and values, which this model does (clip_qkv)": (
            architecture.clamps or lacks("clip_qkv")
        ),
        "attends to earlier tokens only, not to later ones": ahead not in (True, "all"),
    }


def _unrotated(model: GgufModel) -> list[int]:
    """Return the value of `no_rope_layers` if every fourth block has no rotary embeddings: 0 for these blocks, else
    1."""
    return [int((index + 1) % 4 != 0) for index in range(len(model.blocks))]


def _llama4(model: GgufModel, config: Any) -> Holds:
    """Require the settings of Llama 4's released models; give the first one that differs as the reason."""
    assert model.source.input is not None
    # llama.cpp recognises Maverick, which normalises no queries and keys, by its number of experts.
    norms = model.blocks[0].experts != 128
    values = {**model.source.input.fixed, "no_rope_layers": _unrotated(model), "use_qk_norm": norms}
    others = [key for key, value in values.items() if getattr(config, key) != value]
    return {f"computes with {key} = {values[key]} only": False for key in others[:1]}


def _latent(model: GgufModel, config: Any) -> Holds:
    """Require what llama.cpp's latent attention needs, and its way to choose groups of experts."""
    rope, experts = rope_of(config), model.family.experts
    by_best = getattr(config, "topk_method", "greedy") != "greedy"
    return {
        "needs heads in all blocks": all(sizes.heads for sizes in model.blocks),
        "needs a latent vector for queries too (q_lora_rank), except in models of 26 and 27 blocks": (
            config.q_lora_rank or len(model.blocks) in (26, 27)
        ),
        "has no place for the biases of layers that compute latent vectors": (
            not getattr(config, "attention_bias", False)
        ),
        "rotates neighbouring entries of a head, unlike this model": getattr(config, "rope_interleave", True),
        "needs yarn's mscale and mscale_all_dim to be the same number": (
            rope_kind(config) != "yarn" or (rope.get("mscale_all_dim") or 0) == rope.get("mscale")
        ),
        "chooses groups of experts by their best two experts, and this model by the best one": (
            experts is None or model.source.gating != "softmax" or not by_best
        ),
    }


def _mistral4(model: GgufModel, config: Any) -> Holds:
    one = rope_kind(config) != "yarn" or rope_of(config).get("mscale") == 1
    return _latent(model, config) | {"needs yarn's mscale to be 1": one}


def _linear(model: GgufModel, config: Any) -> Holds:
    return {
        "has full attention at regular distances, and linear attention before each of these blocks": model.period,
        "needs keys and values of linear attention to have one size": (
            config.linear_key_head_dim == config.linear_value_head_dim
        ),
    }


def _some_windows(model: GgufModel, _: Any) -> Holds:
    return {"has windows in some blocks, and rotates only in these": model.window is not None}


def _olmo2(_: GgufModel, config: Any) -> Holds:
    base = window_rope_of(config).get("rope_theta")
    return {"rotates with one base (rope_theta) in all blocks": base in (None, rope_of(config)["rope_theta"])}


def _gemma4(model: GgufModel, config: Any) -> Holds:
    own_keys = list(config.layer_types)[: len(model.blocks) - config.num_kv_shared_layers]
    return {
        "needs heads in all blocks": all(sizes.heads for sizes in model.blocks),
        "needs windows in some blocks, and none in others": (
            model.window is not None and "full_attention" in config.layer_types
        ),
        "takes shared keys and values from two blocks, first one with a window and then one without": (
            not config.num_kv_shared_layers or own_keys[-2:] == ["sliding_attention", "full_attention"]
        ),
        "reads per-layer inputs for all tokens (vocab_size_per_layer_input)": (
            not config.hidden_size_per_layer_input or config.vocab_size_per_layer_input == config.vocab_size
        ),
    }


REQUIREMENTS: Mapping[str, Callable[[GgufModel, Any], Holds]] = {
    **dict.fromkeys(("qwen3next", "qwen35", "qwen35moe"), _linear),
    **dict.fromkeys(("cohere2", "exaone-moe"), _some_windows),
    "deepseek2": _latent,
    "mistral4": _mistral4,
    "llama4": _llama4,
    "olmo2": _olmo2,
    "gemma4": _gemma4,
    "smollm3": lambda model, config: {
        "leaves positions out in every fourth block": config.no_rope_layers == _unrotated(model)
    },
    "exaone4": lambda model, _: {
        "has windows in models of 64 blocks, and in no others": (model.window is None) is (len(model.blocks) != 64)
    },
    "command-r": lambda model, config: {
        "normalises queries and keys in models of 64 blocks and more, and in no others": (
            config.use_qk_norm == (len(model.blocks) >= 64)
        )
    },
    "falcon": lambda _, config: {
        "needs rotary positions, and attention and feed-forward in parallel": not config.alibi and config.parallel_attn
    },
    "bloom": lambda _, config: {
        "adds outputs to a residual stream that is not normalised": not config.apply_residual_connection_post_layernorm
    },
    "mpt": lambda _, config: {
        "computes the scale of attention scores from the head size": config.attn_config.softmax_scale is None
    },
    "lfm2moe": lambda _, config: {
        "needs a bias on the choice of experts (use_expert_bias), and gates that are not scaled "
        "(routed_scaling_factor)": config.use_expert_bias and config.routed_scaling_factor == 1
    },
    "gemma2": lambda _, config: {
        "caps logits and attention scores, which this model does not": (
            config.attn_logit_softcapping and config.final_logit_softcapping
        )
    },
    "gpt-oss": lambda model, config: {
        "has a window in every other block, beginning with the first": model.window is not None and model.period == 2,
        "computes with swiglu_limit = 7.0 only": config.swiglu_limit == 7,
    },
}
"""Requirements that only one architecture has, by llama.cpp's names: functions of a model and its config."""
