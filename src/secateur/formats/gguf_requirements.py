"""What graphs of llama.cpp ask of a model, one requirement each.

A requirement gives the rest of a sentence that begins with the graph's name, or None where the model meets it; most are
a sentence with the condition under which it is no hindrance. `COMMON` is asked for every graph, and reads what the
graph's entry says. The others are named in entries of `gguf_architectures.py`, by graphs whose code fixes what
elsewhere is a setting.
"""

from collections.abc import Callable
from typing import Any

from secateur.formats.gguf_architecture import Architecture, Requirement
from secateur.formats.gguf_model import GgufModel

ACTIVATIONS = {
    "silu": {"silu", "swish"},
    "relu2": {"relu2"},
    "xielu": {"xielu"},
    "gelu": {"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"},
}
"""llama.cpp's name → transformers'; it has one gelu, and the exact one differs from it by less than 0.001."""


def unless(holds: Callable[[GgufModel, Architecture], Any], reason: str) -> Requirement:
    """Return the requirement that a condition holds."""
    return lambda model, graph: None if holds(model, graph) else reason


def config(holds: Callable[[Any], Any], reason: str) -> Requirement:
    """Return the requirement that a condition on the config holds."""
    return lambda model, graph: None if holds(model.config) else reason


def has_experts_in_order(model: GgufModel, graph: Architecture) -> str | None:
    """Ask for experts in all blocks, or in all behind the first ones."""
    experts = [bool(width.experts) for width in model.widths]
    if experts == sorted(experts) and (graph.leading or len(set(experts)) == 1):
        return None
    return "has experts in all blocks" + (" behind the first ones" if graph.leading else "")


def makes_such_gates(model: GgufModel, graph: Architecture) -> str | None:
    """Ask for gates that add up to one, or do not."""
    if not any(width.experts for width in model.widths) or graph.normed in (None, model.normed):
        return None
    return "makes gates add up to one" if graph.normed else "leaves gates as they are"


def has_all_heads(model: GgufModel, graph: Architecture) -> str | None:
    """Ask for as many rows of queries as the residual stream has entries."""
    hidden = model.config.hidden_size
    if not graph.square or model.widths[0].heads * model.dim == hidden:
        return None
    return f"wants heads x head size = {hidden}, so all {hidden // model.dim} heads"


def computes_activation(model: GgufModel, graph: Architecture) -> str | None:
    """Ask for the graph's activation."""
    activation = getattr(model.config, model.source.activation, model.source.activation)
    return None if activation in ACTIVATIONS[graph.activation] else f"computes {graph.activation}, not {activation}"


def adds_biases(model: GgufModel, graph: Architecture) -> str | None:
    """Ask for biases in some layers only."""
    extra = model.biases - graph.biases
    return f"has no place for the biases of {', '.join(sorted(extra))}" if extra else None


def scales_rotation(model: GgufModel, graph: Architecture) -> str | None:
    """Ask for a rotary scaling that the graph knows."""
    return None if model.kind in graph.scalings else f"does not know {model.kind} rotary scaling"


def rotates_heads(model: GgufModel, graph: Architecture) -> str | None:
    """Ask for pairs of rotated entries, in some graphs for whole heads of them."""
    if model.rotated != model.dim and not graph.partial:
        return f"rotates whole heads, and here {model.rotated} of {model.dim} entries are"
    return f"rotates entries of a head by pairs, and here {model.rotated} are" if model.rotated % 2 else None


COMMON: tuple[Requirement, ...] = (
    has_experts_in_order,
    unless(
        lambda model, _: len({(width.experts, width.channels) for width in model.widths if width.experts}) <= 1,
        "has as many experts in all blocks that have some, and as many channels in all experts",
    ),
    makes_such_gates,
    unless(
        lambda model, graph: not graph.ungrouped or model.widths[0].groups == model.widths[0].heads,
        "has as many key/value heads as query heads",
    ),
    has_all_heads,
    computes_activation,
    adds_biases,
    scales_rotation,
    unless(
        lambda model, graph: not graph.rounds_yarn or model.kind != "yarn" or model.rope.get("truncate") is not False,
        "rounds the limits of yarn, which this model does not (truncate)",
    ),
    unless(
        lambda model, _: model.window_rope.get("rope_type", "default") == "default",
        "does not scale the rotation of layers with a window",
    ),
    rotates_heads,
    unless(
        lambda model, graph: not graph.windows or graph.windows_by_block or model.window is None or model.period,
        "has windows at regular intervals only, and blocks without between them",
    ),
    config(
        lambda config: not getattr(config, "qk_layernorm", False), "has no place here for norms of queries and keys"
    ),
    config(lambda config: not getattr(config, "conv_bias", False), "has no place for the biases of convolutions"),
    unless(
        lambda model, graph: graph.output != "tied" or model.config.tie_word_embeddings,
        "has the embedding for its output matrix, and this model has another one (tie_word_embeddings)",
    ),
    unless(
        lambda model, graph: graph.caps_logits or not getattr(model.config, "attn_logit_softcapping", None),
        "does not cap attention logits, which this model does",
    ),
)
"""Requirements of every graph, as far as its entry says so, in the order in which they are told."""


def fourth_block_without_positions(model: GgufModel) -> list[int]:
    """Return `no_rope_layers` as graphs take it: 0 for every fourth block."""
    return [int((index + 1) % 4 != 0) for index in range(len(model.widths))]


SMOLLM3 = unless(
    lambda model, _: model.config.no_rope_layers == fourth_block_without_positions(model),
    "leaves positions out in every fourth block",
)
EXAONE4 = unless(
    lambda model, _: (model.window is None) is (len(model.widths) != 64),
    "has windows in models of 64 blocks, and in no others",
)
SOME_WINDOWS = unless(
    lambda model, _: model.window is not None, "has windows in some blocks, and turns positions there"
)
OLMO2 = unless(
    lambda model, _: not model.window_rope or model.window_rope["rope_theta"] == model.rope["rope_theta"],
    "turns positions of all blocks equally fast",
)
COMMAND_R = unless(
    lambda model, _: model.config.use_qk_norm == (len(model.widths) >= 64),
    "norms queries and keys in models of 64 blocks and more, and in no others",
)
FALCON = config(
    lambda config: not config.alibi and config.parallel_attn, "turns positions, and has both modules beside each other"
)
BLOOM = config(lambda config: not config.apply_residual_connection_post_layernorm, "adds to what has not been normed")
MPT = config(
    lambda config: config.attn_config.softmax_scale is None, "takes the scale of attention scores from the head size"
)
LFM2_MOE = config(
    lambda config: config.use_expert_bias and config.routed_scaling_factor == 1,
    "has a bias of the choice, and multiplies gates by nothing",
)
GEMMA2 = config(
    lambda config: config.attn_logit_softcapping and config.final_logit_softcapping,
    "caps logits, which this model does not",
)
HEADS_EVERYWHERE = unless(lambda model, _: min(width.heads for width in model.widths), "has heads in all blocks")


def llama4(model: GgufModel, graph: Architecture) -> str | None:
    """Ask for the settings of Llama 4's released models."""
    fixed: dict[str, Any] = {
        "attention_chunk_size": 8192,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "no_rope_layers": fourth_block_without_positions(model),
        # It tells Maverick, which has no such norms, by the number of its experts.
        "use_qk_norm": model.widths[0].experts != 128,
    }
    other = next((key for key, value in fixed.items() if getattr(model.config, key) != value), None)
    return None if other is None else f"takes {other} for {fixed[other]} here"


def limits_experts(model: GgufModel, graph: Architecture) -> str | None:
    """Ask for gpt-oss's limit of what experts compute."""
    limit = model.config.swiglu_limit
    return None if limit == 7.0 else f"limits what experts compute to 7, and this model to {limit:g}"


GPT_OSS: tuple[Requirement, ...] = (
    # Files that others make of it are rounded as well.
    unless(
        lambda model, _: model.window is not None and model.period == 2,
        "has a window in every other block, the first one among them",
    ),
    limits_experts,
)


def last_keys(config: Any) -> list[str]:
    """Return the kinds of the last two blocks of Gemma 4 that have keys and values of their own."""
    return list(config.layer_types[: len(config.layer_types) - config.num_kv_shared_layers][-2:])


GEMMA4: tuple[Requirement, ...] = (
    HEADS_EVERYWHERE,
    unless(
        lambda model, _: model.window is not None and "full_attention" in model.config.layer_types,
        "has windows in some blocks",
    ),
    config(
        lambda config: not config.num_kv_shared_layers or last_keys(config) == ["sliding_attention", "full_attention"],
        "takes shared keys and values from two blocks, first one with a window and then one without",
    ),
    config(
        lambda config: not config.hidden_size_per_layer_input or config.vocab_size_per_layer_input == config.vocab_size,
        "reads inputs of blocks for all tokens (vocab_size_per_layer_input)",
    ),
    config(lambda config: config.use_bidirectional_attention != "all", "does not look ahead"),
)
LINEAR: tuple[Requirement, ...] = (
    unless(
        lambda model, _: model.period,
        "has full attention at regular intervals, and linear attention before each of them",
    ),
    config(
        lambda config: config.linear_key_head_dim == config.linear_value_head_dim,
        "has keys and values of linear attention of one size",
    ),
)


def chooses_groups_by_two(model: GgufModel, graph: Architecture) -> str | None:
    """Ask for groups of experts that are chosen by their best two."""
    experts, method = model.family.experts, getattr(model.config, "topk_method", "greedy")
    if experts is None or experts.gating != "softmax" or method == "greedy":
        return None
    return "chooses groups of experts by their best two, and this model by their best"


LATENT: tuple[Requirement, ...] = (
    HEADS_EVERYWHERE,
    unless(
        lambda model, _: model.config.q_lora_rank or len(model.widths) in (26, 27),
        "has a latent vector for queries too, but in models of 26 and 27 blocks",
    ),
    config(
        lambda config: not getattr(config, "attention_bias", False),
        "has no place for the biases of what makes latent vectors",
    ),
    config(
        lambda config: getattr(config, "rope_interleave", True),
        "rotates neighbouring entries of a head, unlike this model",
    ),
    unless(
        lambda model, _: model.kind != "yarn" or (model.rope.get("mscale_all_dim") or 0) == model.rope.get("mscale"),
        "takes yarn's mscale and mscale_all_dim for the same number",
    ),
    chooses_groups_by_two,
)
MISTRAL4: tuple[Requirement, ...] = (
    *LATENT,
    unless(lambda model, _: model.kind != "yarn" or model.rope.get("mscale") == 1, "takes yarn's mscale for 1"),
)
