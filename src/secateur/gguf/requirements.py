"""Requirements of llama.cpp's architectures on a model: whatever else they would compute differently.

A reason is the rest of a sentence that begins with the architecture's name. `unmet` yields the reasons of all
architectures; the functions are in the order in which errors list their reasons. `REQUIREMENTS` has those that only
some architectures have.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from secateur.gguf.architecture import Architecture
from secateur.gguf.config import GATES_SUM_TO_ONE
from secateur.gguf.model import GgufModel

ACTIVATIONS = {
    "silu": {"silu", "swish"},
    "relu2": {"relu2"},
    "xielu": {"xielu"},
    "gelu": {"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"},
}
"""transformers' names of activations, by llama.cpp's name. llama.cpp's gelu differs from the exact one by less than
0.001."""
Requirement = Callable[[GgufModel], str | None]
"""Function that returns why an architecture does not compute a model; None if it does."""


def unmet(model: GgufModel, architecture: Architecture) -> Iterator[str]:
    """Yield the reasons why an architecture does not compute a model."""
    yield from _experts(model, architecture)
    yield from _layers(model, architecture)
    yield from _positions(model, architecture)
    yield from _attention_and_output(model, architecture)
    yield from filter(None, (requirement(model) for requirement in REQUIREMENTS.get(architecture.name, ())))


def _experts(model: GgufModel, architecture: Architecture) -> Iterator[str]:
    mixers = {model.is_token_mixer(index) for index in range(len(model.blocks))}
    if model.family.token_mixer is not None and len(mixers) < 2:
        # llama.cpp aborts without either.
        yield "needs blocks with attention, and blocks with a convolution or linear attention"
    experts = [bool(sizes.experts) for sizes in model.blocks]
    if architecture.leading_dense and experts != sorted(experts):
        yield "needs experts in all blocks after the first ones"
    if not architecture.leading_dense and len(set(experts)) > 1:
        yield "needs experts in all blocks or in none"
    if not any(experts):
        return
    if len({(sizes.experts, sizes.expert_channels) for sizes in model.blocks if sizes.experts}) > 1:
        yield "needs the same number of experts, and of channels of each, in all blocks with experts"
    per_token = getattr(model.config, model.experts.experts_per_token)
    if isinstance(per_token, list) and len(set(per_token)) > 1:
        yield "needs the same number of experts per token in all blocks"
    divides = GATES_SUM_TO_ONE.get(architecture.name)
    if divides not in (None, model.gates_sum_to_one):
        what = "divides" if divides else "does not divide"
        yield f"{what} the gates of experts by their sum, unlike this model"


def _layers(model: GgufModel, architecture: Architecture) -> Iterator[str]:
    first, hidden = model.blocks[0], model.config.hidden_size
    if architecture.ungrouped and first.kv_heads != first.heads:
        yield "needs as many key/value heads as query heads"
    if architecture.square and first.heads * model.dim != hidden:
        yield f"needs heads x head size = {hidden}, so all {hidden // model.dim} heads"
    activation = getattr(model.config, model.source.activation, model.source.activation)
    if activation not in ACTIVATIONS[architecture.activation]:
        yield f"computes {architecture.activation}, not {activation}"
    if extra := model.biases - architecture.biases:
        yield f"has no place for the biases of {', '.join(sorted(extra))}"


def _positions(model: GgufModel, architecture: Architecture) -> Iterator[str]:
    if model.rope_kind not in architecture.scalings:
        yield f"does not support {model.rope_kind} rotary scaling"
    if model.rope_kind == "yarn" and not model.rope.get("truncate", True):
        advice = "set truncate to true in config.json to prune the model as llama.cpp computes it"
        yield f"rounds the limits of yarn; {advice}"
    if model.window_rope.get("rope_type", "default") != "default":
        yield "does not scale the rotation of layers with a window"
    if model.rotated != model.dim and not architecture.partial:
        yield f"rotates whole heads, but {model.rotated} of {model.dim} entries rotate here"
    if model.rotated % 2:
        yield f"rotates entries of a head in pairs, but {model.rotated} rotate here"
    if architecture.has_windows and not architecture.windows_by_block and model.window is not None and not model.period:
        yield "supports windows only where blocks without a window lie at regular distances"


def _attention_and_output(model: GgufModel, architecture: Architecture) -> Iterator[str]:
    config = model.config
    if getattr(config, "qk_layernorm", False):
        yield "has no norms of queries and keys, which this model has"
    if getattr(config, "conv_bias", False):
        yield "has no place for the biases of convolutions"
    if architecture.output == "tied" and not config.tie_word_embeddings:
        yield "uses the embedding as its output matrix, and this model has another one (tie_word_embeddings)"
    if getattr(config, "attn_logit_softcapping", None) and not architecture.caps_scores:
        yield "does not cap attention scores, which this model does"
    if getattr(config, "clip_qkv", None) and not architecture.clamps:
        yield "does not clip queries, keys and values, which this model does (clip_qkv)"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        yield "attends to earlier tokens only, not to later ones"


def requires(holds: Callable[[GgufModel], Any], reason: str) -> Requirement:
    """Return a requirement that a condition on the model holds."""
    return lambda model: None if holds(model) else reason


def _every_fourth_unrotated(model: GgufModel) -> list[int]:
    """Return the value of `no_rope_layers` if every fourth block has no rotary embeddings: 0 for these blocks, else
    1."""
    return [int((index + 1) % 4 != 0) for index in range(len(model.blocks))]


def _settings_of_llama4(model: GgufModel) -> str | None:
    """Require the settings of Llama 4's released models."""
    assert model.source.input is not None
    # llama.cpp recognises Maverick, which normalises no queries and keys, by its number of experts.
    norms = model.blocks[0].experts != 128
    values = {**model.source.input.fixed, "no_rope_layers": _every_fourth_unrotated(model), "use_qk_norm": norms}
    other = next((key for key, value in values.items() if getattr(model.config, key) != value), None)
    return None if other is None else f"computes with {other} = {values[other]} only"


def _keys_of_last_blocks(model: GgufModel) -> bool:
    """Return whether the last blocks of Gemma 4 that have keys of their own are one with a window and one without, if
    later blocks share their keys."""
    shared, types = model.config.num_kv_shared_layers, list(model.config.layer_types)
    return not shared or types[: len(types) - shared][-2:] == ["sliding_attention", "full_attention"]


def _groups_by_best(model: GgufModel) -> bool:
    """Return whether groups of experts are not chosen by their best expert, or the architecture may do so too."""
    experts, method = model.family.experts, getattr(model.config, "topk_method", "greedy")
    return experts is None or experts.gating != "softmax" or method == "greedy"


_HEADS_EVERYWHERE = requires(lambda model: min(sizes.heads for sizes in model.blocks), "needs heads in all blocks")
_SOME_WINDOWS = requires(
    lambda model: model.window is not None, "has windows in some blocks, and rotates only in these"
)
_LINEAR = (
    requires(
        lambda model: model.period,
        "has full attention at regular distances, and linear attention before each of these blocks",
    ),
    requires(
        lambda model: model.config.linear_key_head_dim == model.config.linear_value_head_dim,
        "needs keys and values of linear attention to have one size",
    ),
)
_LATENT = (
    _HEADS_EVERYWHERE,
    requires(
        lambda model: model.config.q_lora_rank or len(model.blocks) in (26, 27),
        "needs a latent vector for queries too (q_lora_rank), except in models of 26 and 27 blocks",
    ),
    requires(
        lambda model: not getattr(model.config, "attention_bias", False),
        "has no place for the biases of layers that compute latent vectors",
    ),
    requires(
        lambda model: getattr(model.config, "rope_interleave", True),
        "rotates neighbouring entries of a head, unlike this model",
    ),
    requires(
        lambda model: model.rope_kind != "yarn" or (model.rope.get("mscale_all_dim") or 0) == model.rope.get("mscale"),
        "needs yarn's mscale and mscale_all_dim to be the same number",
    ),
    requires(_groups_by_best, "chooses groups of experts by their best two experts, and this model by the best one"),
)

REQUIREMENTS: Mapping[str, tuple[Requirement, ...]] = {
    **dict.fromkeys(("qwen3next", "qwen35", "qwen35moe"), _LINEAR),
    **dict.fromkeys(("cohere2", "exaone-moe"), (_SOME_WINDOWS,)),
    "deepseek2": _LATENT,
    "mistral4": (
        *_LATENT,
        requires(
            lambda model: model.rope_kind != "yarn" or model.rope.get("mscale") == 1, "needs yarn's mscale to be 1"
        ),
    ),
    "llama4": (_settings_of_llama4,),
    "smollm3": (
        requires(
            lambda model: model.config.no_rope_layers == _every_fourth_unrotated(model),
            "leaves positions out in every fourth block",
        ),
    ),
    "exaone4": (
        requires(
            lambda model: (model.window is None) is (len(model.blocks) != 64),
            "has windows in models of 64 blocks, and in no others",
        ),
    ),
    "olmo2": (
        requires(
            lambda model: not model.window_rope or model.window_rope["rope_theta"] == model.rope["rope_theta"],
            "rotates with one base (rope_theta) in all blocks",
        ),
    ),
    "command-r": (
        requires(
            lambda model: model.config.use_qk_norm == (len(model.blocks) >= 64),
            "normalises queries and keys in models of 64 blocks and more, and in no others",
        ),
    ),
    "falcon": (
        requires(
            lambda model: not model.config.alibi and model.config.parallel_attn,
            "needs rotary positions, and attention and feed-forward in parallel",
        ),
    ),
    "bloom": (
        requires(
            lambda model: not model.config.apply_residual_connection_post_layernorm,
            "adds outputs to a residual stream that is not normalised",
        ),
    ),
    "mpt": (
        requires(
            lambda model: model.config.attn_config.softmax_scale is None,
            "computes the scale of attention scores from the head size",
        ),
    ),
    "lfm2moe": (
        requires(
            lambda model: model.config.use_expert_bias and model.config.routed_scaling_factor == 1,
            "needs a bias on the choice of experts (use_expert_bias), and gates that are not scaled "
            "(routed_scaling_factor)",
        ),
    ),
    "gemma2": (
        requires(
            lambda model: model.config.attn_logit_softcapping and model.config.final_logit_softcapping,
            "caps logits and attention scores, which this model does not",
        ),
    ),
    "gpt-oss": (
        requires(
            lambda model: model.window is not None and model.period == 2,
            "has a window in every other block, beginning with the first",
        ),
        requires(lambda model: model.config.swiglu_limit == 7, "computes with swiglu_limit = 7.0 only"),
    ),
    "gemma4": (
        _HEADS_EVERYWHERE,
        requires(
            lambda model: model.window is not None and "full_attention" in model.config.layer_types,
            "needs windows in some blocks, and none in others",
        ),
        requires(
            _keys_of_last_blocks,
            "takes shared keys and values from two blocks, first one with a window and then one without",
        ),
        requires(
            lambda model: (
                not model.config.hidden_size_per_layer_input
                or model.config.vocab_size_per_layer_input == model.config.vocab_size
            ),
            "reads per-layer inputs for all tokens (vocab_size_per_layer_input)",
        ),
    ),
}
"""Requirements of single architectures, by llama.cpp's names."""
