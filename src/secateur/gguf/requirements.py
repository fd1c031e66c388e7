"""Requirements of llama.cpp's architectures on a model, one function each.

A requirement returns None for a model that meets it; otherwise it returns the rest of a sentence that begins with the
architecture's name. Most are made by `requires` or `config_requires` from a condition and the sentence. The
requirements in `COMMON` apply to every architecture. The others apply to the architectures whose entries in
`architectures.py` list them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from secateur.gguf.architecture import Architecture, Requirement
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


def requires(holds: Callable[[GgufModel, Architecture], Any], reason: str) -> Requirement:
    """Return a requirement that a condition on the model holds."""
    return lambda model, architecture: None if holds(model, architecture) else reason


def config_requires(holds: Callable[[Any], Any], reason: str) -> Requirement:
    """Return a requirement that a condition on the config holds."""
    return lambda model, _: None if holds(model.config) else reason


def _fixed(model: GgufModel, values: dict[str, Any]) -> str | None:
    """Require config values that are constants in an architecture's code."""
    other = next((key for key, value in values.items() if getattr(model.config, key) != value), None)
    return None if other is None else f"computes with {other} = {values[other]} only"


def _experts_in_order(model: GgufModel, architecture: Architecture) -> str | None:
    """Require experts in all blocks, or in all blocks after the first ones."""
    experts = [bool(sizes.experts) for sizes in model.blocks]
    allowed = experts == sorted(experts) if architecture.leading_dense else len(set(experts)) == 1
    where = "in all blocks after the first ones" if architecture.leading_dense else "in all blocks or in none"
    return None if allowed else f"needs experts {where}"


def _gates(model: GgufModel, architecture: Architecture) -> str | None:
    """Require that gates of experts are divided by their sum, or that they are not, as in the architecture's code."""
    divides = GATES_SUM_TO_ONE.get(architecture.name)
    if model.first_experts is None or divides in (None, model.gates_sum_to_one):
        return None
    what = "divides" if divides else "does not divide"
    return f"{what} the gates of experts by their sum, unlike this model"


def _all_heads(model: GgufModel, architecture: Architecture) -> str | None:
    """Require heads x head size to be the width of the residual stream."""
    hidden = model.config.hidden_size
    if not architecture.square or model.blocks[0].heads * model.dim == hidden:
        return None
    return f"needs heads x head size = {hidden}, so all {hidden // model.dim} heads"


def _activation(model: GgufModel, architecture: Architecture) -> str | None:
    """Require the architecture's activation."""
    activation = getattr(model.config, model.source.activation, model.source.activation)
    if activation in ACTIVATIONS[architecture.activation]:
        return None
    return f"computes {architecture.activation}, not {activation}"


def _biases(model: GgufModel, architecture: Architecture) -> str | None:
    """Require that only layers with a place for a bias have one."""
    extra = model.biases - architecture.biases
    return f"has no place for the biases of {', '.join(sorted(extra))}" if extra else None


def _scaling(model: GgufModel, architecture: Architecture) -> str | None:
    """Require a known kind of rotary scaling."""
    kind = model.rope_kind
    return None if kind in architecture.scalings else f"does not support {kind} rotary scaling"


def _whole_rotation(model: GgufModel, architecture: Architecture) -> str | None:
    """Require that all entries of a head rotate, where the architecture cannot rotate some."""
    if architecture.partial or model.rotated == model.dim:
        return None
    return f"rotates whole heads, but {model.rotated} of {model.dim} entries rotate here"


def _paired_rotation(model: GgufModel, _: Architecture) -> str | None:
    """Require an even number of rotated entries."""
    return f"rotates entries of a head in pairs, but {model.rotated} rotate here" if model.rotated % 2 else None


def _same_number_per_token(model: GgufModel, _: Architecture) -> bool:
    """Return whether each token uses the same number of experts in all mixtures; a config may have a list of
    numbers."""
    per_token = getattr(model.config, model.experts.experts_per_token) if model.first_experts is not None else 1
    return not isinstance(per_token, list) or len(set(per_token)) == 1


def _same_experts(model: GgufModel, _: Architecture) -> bool:
    """Return whether all mixtures have the same numbers of experts and of expert channels."""
    return len({(sizes.experts, sizes.expert_channels) for sizes in model.blocks if sizes.experts}) <= 1


def _both_kinds_of_block(model: GgufModel, _: Architecture) -> bool:
    """Return whether some blocks have attention and others the family's token mixer, if the family has one. llama.cpp
    aborts without either."""
    mixers = {model.is_token_mixer(index) for index in range(len(model.blocks))}
    return model.family.token_mixer is None or len(mixers) == 2


COMMON: tuple[Requirement, ...] = (
    requires(_both_kinds_of_block, "needs blocks with attention, and blocks with a convolution or linear attention"),
    _experts_in_order,
    requires(_same_experts, "needs the same number of experts, and of channels of each, in all blocks with experts"),
    requires(_same_number_per_token, "needs the same number of experts per token in all blocks"),
    _gates,
    requires(
        lambda model, architecture: not architecture.ungrouped or model.blocks[0].kv_heads == model.blocks[0].heads,
        "needs as many key/value heads as query heads",
    ),
    _all_heads,
    _activation,
    _biases,
    _scaling,
    requires(
        lambda model, _: model.rope_kind != "yarn" or model.rope.get("truncate", True),
        "rounds the limits of yarn; set truncate to true in config.json to prune the model as llama.cpp computes it",
    ),
    requires(
        lambda model, _: model.window_rope.get("rope_type", "default") == "default",
        "does not scale the rotation of layers with a window",
    ),
    _whole_rotation,
    _paired_rotation,
    requires(
        lambda model, architecture: (
            not architecture.has_windows or architecture.windows_by_block or model.window is None or model.period
        ),
        "supports windows only where blocks without a window lie at regular distances",
    ),
    config_requires(
        lambda config: not getattr(config, "qk_layernorm", False),
        "has no norms of queries and keys, which this model has",
    ),
    config_requires(
        lambda config: not getattr(config, "conv_bias", False), "has no place for the biases of convolutions"
    ),
    requires(
        lambda model, architecture: architecture.output != "tied" or model.config.tie_word_embeddings,
        "uses the embedding as its output matrix, and this model has another one (tie_word_embeddings)",
    ),
    requires(
        lambda model, architecture: (
            architecture.caps_scores or not getattr(model.config, "attn_logit_softcapping", None)
        ),
        "does not cap attention scores, which this model does",
    ),
    requires(
        lambda model, architecture: architecture.clamps or not getattr(model.config, "clip_qkv", None),
        "does not clip queries, keys and values, which this model does (clip_qkv)",
    ),
    config_requires(
        lambda config: getattr(config, "use_bidirectional_attention", None) not in (True, "all"),
        "attends to earlier tokens only, not to later ones",
    ),
)
"""Requirements of every architecture, in the order in which errors list them."""


def _every_fourth_unrotated(model: GgufModel) -> list[int]:
    """Return the value of `no_rope_layers` if every fourth block has no rotary embeddings: 0 for these blocks, else
    1."""
    return [int((index + 1) % 4 != 0) for index in range(len(model.blocks))]


def llama4(model: GgufModel, _: Architecture) -> str | None:
    """Require the settings of Llama 4's released models."""
    assert model.source.input is not None
    # llama.cpp recognises Maverick, which normalises no queries and keys, by its number of experts.
    norms = model.blocks[0].experts != 128
    fixed = {"no_rope_layers": _every_fourth_unrotated(model), "use_qk_norm": norms}
    return _fixed(model, {**model.source.input.fixed, **fixed})


def _last_keys(config: Any) -> Sequence[str]:
    """Return the types of the last two blocks of Gemma 4 that have keys and values of their own."""
    return list(config.layer_types[: len(config.layer_types) - config.num_kv_shared_layers][-2:])


SMOLLM3 = requires(
    lambda model, _: model.config.no_rope_layers == _every_fourth_unrotated(model),
    "leaves positions out in every fourth block",
)
EXAONE4 = requires(
    lambda model, _: (model.window is None) is (len(model.blocks) != 64),
    "has windows in models of 64 blocks, and in no others",
)
SOME_WINDOWS = requires(
    lambda model, _: model.window is not None, "has windows in some blocks, and rotates only in these"
)
OLMO2 = requires(
    lambda model, _: not model.window_rope or model.window_rope["rope_theta"] == model.rope["rope_theta"],
    "rotates with one base (rope_theta) in all blocks",
)
COMMAND_R = requires(
    lambda model, _: model.config.use_qk_norm == (len(model.blocks) >= 64),
    "normalises queries and keys in models of 64 blocks and more, and in no others",
)
FALCON = config_requires(
    lambda config: not config.alibi and config.parallel_attn,
    "needs rotary positions, and attention and feed-forward in parallel",
)
BLOOM = config_requires(
    lambda config: not config.apply_residual_connection_post_layernorm,
    "adds outputs to a residual stream that is not normalised",
)
MPT = config_requires(
    lambda config: config.attn_config.softmax_scale is None, "computes the scale of attention scores from the head size"
)
LFM2_MOE = config_requires(
    lambda config: config.use_expert_bias and config.routed_scaling_factor == 1,
    "needs a bias on the choice of experts (use_expert_bias), and gates that are not scaled (routed_scaling_factor)",
)
GEMMA2 = config_requires(
    lambda config: config.attn_logit_softcapping and config.final_logit_softcapping,
    "caps logits and attention scores, which this model does not",
)
GPT_OSS: tuple[Requirement, ...] = (
    requires(
        lambda model, _: model.window is not None and model.period == 2,
        "has a window in every other block, beginning with the first",
    ),
    lambda model, _: _fixed(model, {"swiglu_limit": 7.0}),
)
HEADS_EVERYWHERE = requires(lambda model, _: min(sizes.heads for sizes in model.blocks), "needs heads in all blocks")
GEMMA4: tuple[Requirement, ...] = (
    HEADS_EVERYWHERE,
    requires(
        lambda model, _: model.window is not None and "full_attention" in model.config.layer_types,
        "needs windows in some blocks, and none in others",
    ),
    config_requires(
        lambda config: not config.num_kv_shared_layers or _last_keys(config) == ["sliding_attention", "full_attention"],
        "takes shared keys and values from two blocks, first one with a window and then one without",
    ),
    config_requires(
        lambda config: not config.hidden_size_per_layer_input or config.vocab_size_per_layer_input == config.vocab_size,
        "reads per-layer inputs for all tokens (vocab_size_per_layer_input)",
    ),
)
LINEAR: tuple[Requirement, ...] = (
    requires(
        lambda model, _: model.period,
        "has full attention at regular distances, and linear attention before each of these blocks",
    ),
    config_requires(
        lambda config: config.linear_key_head_dim == config.linear_value_head_dim,
        "needs keys and values of linear attention to have one size",
    ),
)


def _groups_by_best_two(model: GgufModel, _: Architecture) -> str | None:
    """Require that groups of experts are chosen by the sum of their two best experts, or that there are no groups."""
    experts, method = model.family.experts, getattr(model.config, "topk_method", "greedy")
    if experts is None or experts.gating != "softmax" or method == "greedy":
        return None
    return "chooses groups of experts by their best two experts, and this model by the best one"


LATENT: tuple[Requirement, ...] = (
    HEADS_EVERYWHERE,
    requires(
        lambda model, _: model.config.q_lora_rank or len(model.blocks) in (26, 27),
        "needs a latent vector for queries too (q_lora_rank), except in models of 26 and 27 blocks",
    ),
    config_requires(
        lambda config: not getattr(config, "attention_bias", False),
        "has no place for the biases of layers that compute latent vectors",
    ),
    config_requires(
        lambda config: getattr(config, "rope_interleave", True),
        "rotates neighbouring entries of a head, unlike this model",
    ),
    requires(
        lambda model, _: (
            model.rope_kind != "yarn" or (model.rope.get("mscale_all_dim") or 0) == model.rope.get("mscale")
        ),
        "needs yarn's mscale and mscale_all_dim to be the same number",
    ),
    _groups_by_best_two,
)
MISTRAL4: tuple[Requirement, ...] = (
    *LATENT,
    requires(
        lambda model, _: model.rope_kind != "yarn" or model.rope.get("mscale") == 1, "needs yarn's mscale to be 1"
    ),
)
