"""Model families as data: which tensors of a block form its two depth-2 modules.

One entry a family. An entry says how the layers are called; sizes, biases and the orientation of stored
matrices are read off the block itself (on the meta device), so that an entry needs no more than names.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from secateur.base.errors import SecateurError
from secateur.base.quiet import quiet


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of the feed-forward, in all blocks or in some."""

    experts: str = "experts"
    """The submodule that holds all experts' matrices, an axis of experts first."""
    router: str = "gate"
    """The submodule that says which experts a token meets, and how much each counts."""
    bias: str | None = None
    """What the feed-forward holds and hands to the router: a bias of the choice."""
    count: str = "num_experts"
    """The config's key of how many there are."""
    chosen: str = "num_experts_per_tok"
    """That of how many a token meets."""
    width: str = "moe_intermediate_size"
    """That of how many channels each has."""
    shared_width: str | None = None
    """That of how many the shared expert has, where it does not follow from the others'."""
    groups: tuple[str, str] | None = None
    """Those of the number of runs of experts, and of how many runs a token may choose from; all runs stay equally
    long."""
    shared: str | None = None
    """The submodule of the expert that all tokens meet, where there is one."""
    shared_gate: str | None = None
    """What says how much that one counts, if it does not always count in full."""
    apart: tuple[str, str] | None = None
    """Where experts and router hang in the block itself, beside a feed-forward that stays: the norm through which the
    experts read what the router does, and the one behind them. The feed-forward's own follows on the sum of both."""
    scored: bool = False
    """The feed-forward gives the router's scores behind its output."""
    scales_inputs: bool = False
    """What an expert counts is a factor of what it reads, not of what it gives."""
    stored: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("gate_up_proj", ("gate_proj", "up_proj")),
        ("down_proj", ("down_proj",)),
    )
    """What checkpoints hold apart, expert by expert, in each of the submodule's tensors."""
    renamed: tuple[tuple[str, str], ...] = ()
    """What the block calls a part of a tensor's name, and what checkpoints do."""


@dataclass(frozen=True)
class Family:
    """Names of one architecture's layers, relative to the block except for `blocks`."""

    blocks: str = "model.layers"
    attention: str = "self_attn"
    queries: str = "q_proj"
    keys: str = "k_proj"
    values: str = "v_proj"
    output: str = "o_proj"
    fused: str | None = None
    """One layer for queries, keys and values, in place of the three."""
    interleaved: bool = False
    """The fused layer holds the queries, the key and the value of one group after the other, not all queries first."""
    groups: Callable[[Any], int] | None = None
    """How many key/value heads a config means, where that is not its num_key_value_heads."""
    ungrouped: bool = False
    """Every query head has a key and a value of its own, and sizes follow from the number of heads, whatever else the
    config says."""
    latent: tuple[str, str] | None = None
    """The layer that makes the vector that all heads share, and the one that makes keys and values of it (multi-head
    latent attention); `queries` may make theirs of such a vector too, and is then called by `latent_queries`."""
    latent_queries: str = "q_b_proj"
    sinks: str | None = None
    """A parameter of the attention that has one entry for each query head."""
    feed_forward: str | None = "mlp"
    """The feed-forward submodule; None where its layers hang in the block itself."""
    up: str = "up_proj"
    gate: str | None = "gate_proj"
    down: str = "down_proj"
    fused_gate: str | None = None
    """One layer that holds the gate's rows, then the up layer's."""
    final_norm: str = "model.norm"
    """The norm between the last block and the output layer, by its name in the whole model."""
    norm_offset: bool = False
    """Norms store their gain less one."""
    norm_after_attention: str | None = None
    norm_after_feed_forward: str | None = None
    """Norms between level 2 and the residual stream."""
    norm_before_attention: str | None = None
    norm_before_feed_forward: str | None = None
    """Norms between the residual stream and level 1; named only where there are norms behind the modules as well, to
    know how strongly later layers read what a module writes."""
    heads_fixed: bool = False
    """The attention cannot go as a whole either."""
    adds: bool = False
    """The attention adds its output to the residual stream itself, and so does the feed-forward."""
    heads_locked: str | None = None
    """Why heads cannot be removed exactly, where that is so; all or none then stay."""
    locking: str | None = None
    """The config's key under which alone that is so."""
    mixer: tuple[str, str] | None = None
    """What stands in the attention's place in some blocks (linear attention, a convolution) and its output layer. It is
    left alone there: heads go from the other blocks, and channels from all of them."""
    multiplier: str | None = None
    """The config's key of a factor between what a module gives and the residual stream."""
    scalar: str | None = None
    """The block's factor for the whole residual stream behind it."""
    own_inputs: str | None = None
    """The config's key of the width of what each block reads of every token beside the residual stream, behind both
    modules."""
    own_output: str = "per_layer_projection"
    """The layer by which a block adds what it makes of that."""
    shared_blocks: str | None = None
    """The config's key of how many of the last blocks attend with keys and values of earlier ones."""
    activation: str | None = None
    """The function between the two levels of the feed-forward, where it has parameters of its own."""
    experts: Experts | None = None
    """The mixture of experts that stands in the feed-forward's place in some blocks, or in all."""
    tupled: bool = False
    """Blocks give more behind the residual stream."""

    @property
    def base(self) -> str:
        """What the whole model calls all but its output layer; Llama 4's `base_model_prefix` is another model's."""
        return self.blocks.partition(".")[0]

    def lock(self, config: Any) -> str | None:
        """Why heads cannot be removed exactly from the blocks of a config."""
        return self.heads_locked if self.locking is None or getattr(config, self.locking, None) else None


LLAMA = Family()
ALIBI = "the position of a head decides how fast its attention fades"
BLOOM = Family(
    blocks="transformer.h",
    final_norm="transformer.ln_f",
    attention="self_attention",
    output="dense",
    ungrouped=True,
    feed_forward=None,
    up="mlp.dense_h_to_4h",
    gate=None,
    down="mlp.dense_4h_to_h",
    activation="mlp.gelu_impl",
    adds=True,
    heads_locked=ALIBI,
    heads_fixed=True,
    tupled=True,
)
LINEAR = ("linear_attn", "out_proj")
"""Qwen's linear attention, as a mixer."""
POST_NORMS = replace(
    LLAMA,
    norm_after_attention="post_attention_layernorm",
    norm_after_feed_forward="post_feedforward_layernorm",
)
GEMMA = replace(
    POST_NORMS,
    norm_offset=True,
    norm_before_attention="input_layernorm",
    norm_before_feed_forward="pre_feedforward_layernorm",
)

NO_GATE = replace(LLAMA, gate=None)
OLMO2 = replace(POST_NORMS, heads_locked="its query and key norms run across all heads")
GLM = replace(LLAMA, gate=None, fused_gate="gate_up_proj")
LATENT = replace(LLAMA, latent=("kv_a_proj_with_mqa", "kv_b_proj"))

LFM2 = Family(
    output="out_proj",
    feed_forward="feed_forward",
    up="w3",
    gate="w1",
    down="w2",
    final_norm="model.embedding_norm",
    mixer=("conv", "out_proj"),
)

_W = (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",)))
QWEN_MOE = replace(
    LLAMA,
    experts=Experts(
        shared="shared_expert", shared_gate="shared_expert_gate", shared_width="shared_expert_intermediate_size"
    ),
)
QWEN_NEXT = replace(QWEN_MOE, norm_offset=True, mixer=LINEAR)
DEEPSEEK = Experts(count="n_routed_experts", groups=("n_group", "topk_group"), shared="shared_experts")
MIXTRAL = Experts(
    stored=_W, count="num_local_experts", width="intermediate_size", renamed=(("mlp.", "block_sparse_moe."),)
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "olmo2": OLMO2,
    "phi3": replace(GLM, fused="qkv_proj"),
    "apertus": replace(NO_GATE, activation="act_fn"),
    "arcee": NO_GATE,
    "cohere": LLAMA,
    "cohere2": LLAMA,
    "cwm": LLAMA,
    "ernie4_5": LLAMA,
    "exaone4": POST_NORMS,
    "gemma": replace(LLAMA, norm_offset=True),
    "gemma4_text": replace(
        GEMMA,
        norm_offset=False,
        scalar="layer_scalar",
        heads_locked="its windowed blocks have other heads than its blocks of full attention",
        own_inputs="hidden_size_per_layer_input",
        shared_blocks="num_kv_shared_layers",
        experts=Experts(
            router="router",
            chosen="top_k_experts",
            apart=("pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"),
        ),
    ),
    "glm": GLM,
    "glm4": replace(
        GLM,
        norm_after_attention="post_self_attn_layernorm",
        norm_after_feed_forward="post_mlp_layernorm",
        norm_before_attention="input_layernorm",
        norm_before_feed_forward="post_attention_layernorm",
    ),
    "granite": replace(LLAMA, multiplier="residual_multiplier"),
    "helium": LLAMA,
    "hunyuan_v1_dense": LLAMA,
    "jais2": NO_GATE,
    "lfm2": LFM2,
    "ministral": LLAMA,
    "ministral3": LLAMA,
    "nanochat": replace(NO_GATE, up="fc1", down="fc2"),
    "nemotron": replace(NO_GATE, norm_offset=True),
    "olmo": LLAMA,
    "olmo3": OLMO2,
    "phi": replace(NO_GATE, output="dense", up="fc1", down="fc2", final_norm="model.final_layernorm"),
    "qwen3_5_text": replace(LLAMA, norm_offset=True, mixer=LINEAR),
    "seed_oss": LLAMA,
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "starcoder2": replace(NO_GATE, up="c_fc", down="c_proj"),
    "vaultgemma": replace(LLAMA, norm_offset=True),
    "youtu": LATENT,
    "gptj": Family(
        ungrouped=True,
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        attention="attn",
        output="out_proj",
        up="fc_in",
        gate=None,
        down="fc_out",
    ),
    "bloom": BLOOM,
    "falcon": replace(
        BLOOM,
        ungrouped=False,
        fused="query_key_value",
        interleaved=True,
        groups=lambda config: (
            1 if config.multi_query and not config.new_decoder_architecture else int(config.num_kv_heads)
        ),
        feed_forward="mlp",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation="act",
        adds=False,
        locking="alibi",
    ),
    "mpt": Family(
        ungrouped=True,
        tupled=True,
        blocks="transformer.blocks",
        final_norm="transformer.norm_f",
        attention="attn",
        output="out_proj",
        feed_forward=None,
        up="ffn.up_proj",
        gate=None,
        down="ffn.down_proj",
        activation="ffn.act",
        heads_locked=ALIBI,
    ),
    "opt": Family(
        ungrouped=True,
        blocks="model.decoder.layers",
        output="out_proj",
        feed_forward=None,
        up="fc1",
        gate=None,
        down="fc2",
        final_norm="model.decoder.final_layer_norm",
    ),
    "gpt2": Family(
        ungrouped=True,
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        attention="attn",
        fused="c_attn",
        output="c_proj",
        up="c_fc",
        gate=None,
        down="c_proj",
    ),
    "gpt_neox": Family(
        ungrouped=True,
        blocks="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        fused="query_key_value",
        interleaved=True,
        output="dense",
        up="dense_h_to_4h",
        gate=None,
        down="dense_4h_to_h",
    ),
    "dots1": replace(LLAMA, experts=DEEPSEEK),
    "ernie4_5_moe": replace(
        LLAMA,
        experts=Experts(
            count="moe_num_experts",
            chosen="moe_k",
            shared="shared_experts",
            renamed=(("gate.moe_statics.", "moe_statics."),),
        ),
    ),
    "exaone_moe": replace(
        LLAMA,
        experts=replace(DEEPSEEK, count="num_experts", renamed=(("gate.e_score_correction", "e_score_correction"),)),
    ),
    "flex_olmo": replace(OLMO2, experts=Experts(width="intermediate_size")),
    "granitemoe": replace(
        LLAMA,
        feed_forward="block_sparse_moe",
        multiplier="residual_multiplier",
        experts=Experts(
            router="router",
            count="num_local_experts",
            width="intermediate_size",
            renamed=(
                ("experts.gate_up_proj", "input_linear.weight"),
                ("experts.down_proj", "output_linear.weight"),
                ("router.weight", "router.layer.weight"),
            ),
        ),
    ),
    "gpt_oss": replace(
        LLAMA,
        sinks="sinks",
        experts=Experts(router="router", count="num_local_experts", width="intermediate_size", scored=True),
    ),
    "hunyuan_v1_moe": replace(
        LLAMA, experts=Experts(chosen="moe_topk", width="intermediate_size", shared="shared_mlp")
    ),
    "phimoe": replace(
        LLAMA, experts=replace(MIXTRAL, router="router", renamed=(("mlp.", "block_sparse_moe."), ("router.", "gate.")))
    ),
    "qwen3_5_moe_text": QWEN_NEXT,
    "solar_open": replace(LLAMA, experts=DEEPSEEK),
    "qwen3_next": QWEN_NEXT,
    "deepseek_v2": replace(LATENT, experts=DEEPSEEK),
    "deepseek_v3": replace(LATENT, experts=DEEPSEEK),
    "glm4_moe": replace(LLAMA, experts=DEEPSEEK),
    "glm4_moe_lite": replace(LATENT, experts=DEEPSEEK),
    "lfm2_moe": replace(LFM2, experts=Experts(bias="expert_bias", stored=_W)),
    "minimax_m2": replace(LLAMA, experts=replace(MIXTRAL, bias="e_score_correction_bias")),
    "mistral4": replace(LATENT, experts=DEEPSEEK),
    "llama4_text": replace(
        LLAMA,
        feed_forward="feed_forward",
        experts=Experts(
            router="router",
            count="num_local_experts",
            width="intermediate_size",
            shared="shared_expert",
            scored=True,
            scales_inputs=True,
        ),
    ),
    "mixtral": replace(LLAMA, experts=MIXTRAL),
    "olmoe": replace(
        OLMO2, experts=Experts(width="intermediate_size"), norm_after_attention=None, norm_after_feed_forward=None
    ),
    "qwen2_moe": QWEN_MOE,
    "qwen3_moe": replace(LLAMA, experts=Experts()),
}


@dataclass(frozen=True)
class Twin:
    """A family that computes the same of a text as a decoder without a causal language model class of its own."""

    family: str
    more: dict[str, Any] = field(default_factory=dict)
    """What the family's config must say for that."""
    derives: bool = False
    """The decoder's class derives the head size, as that of the family does not."""
    turned: bool = False
    """Its checkpoints may hold matrices of experts with inputs first."""


TWINS: dict[str, Twin] = {
    "qwen2_vl_text": Twin("qwen2", derives=True),
    "qwen2_5_vl_text": Twin("qwen2", derives=True),
    "qwen3_vl_text": Twin("qwen3"),
    "qwen3_vl_moe_text": Twin("qwen3_moe", {"norm_topk_prob": True}, turned=True),
}
"""Decoders inside multimodal models → their twins. The positions that such a decoder turns heads by, in sections, are
all alike where there is text alone, and no picture adds anything."""

MECHANISMS = {
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok"),
    "latent attention": ("kv_lora_rank",),
    "layers of linear attention, convolution or state space": (
        *("linear_num_value_heads", "conv_L_cache", "mamba_d_state", "mamba_n_heads", "state_size", "ssm_cfg"),
        *("attention_hidden_size", "lru_width"),
    ),
}
"""What blocks without an entry may have beside an attention and a feed-forward, by keys of their configs."""


def twin_of(config: Any) -> Twin | None:
    """The twin whose config this is, in the place of a decoder's own; None where it is a family's."""
    return TWINS.get(getattr(config, "twin_of", ""))


def family_of(config: Any) -> Family:
    """The entry for a config; `SecateurError` for an architecture that has none, with what it would need."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        wanting = [what for what, keys in MECHANISMS.items() if any(getattr(config, key, None) for key in keys)]
        why = (
            f"it has {' and '.join(wanting)}, for which there is no code yet"
            if wanting
            else "a new one whose blocks are an attention and a feed-forward needs an entry in "
            "secateur/model/families.py: the names of its blocks and of their layers"
        )
        raise SecateurError(
            f"model type '{config.model_type}' is not supported; secateur families prints those that are ({why})"
        )
    return family


def mixture_of(config: Any) -> Experts | None:
    """How a model's experts are called; None where it has none, as its family has none or its config asks for none."""
    found = family.experts if (family := FAMILIES.get(config.model_type)) else None
    return found if found and getattr(config, found.count, None) else None


def head_dim(config: Any) -> int:
    """Entries per attention head; of most blocks, where they differ."""
    with quiet():
        own = None if family_of(config).ungrouped else getattr(config, "head_dim", None)
        return own or config.hidden_size // config.num_attention_heads


def groups_of(config: Any) -> int:
    """Key/value heads of a block; of most, where they differ."""
    family = family_of(config)
    if family.groups is not None:
        return family.groups(config)
    with quiet():
        own = None if family.ungrouped else getattr(config, "num_key_value_heads", None)
        return int(config.num_attention_heads if own is None else own)


def latent_width(config: Any) -> int | None:
    """Entries that one token has in a block's cache, however many heads there are; None where each has its own."""
    if family_of(config).latent is None:
        return None
    return int(config.kv_lora_rank + config.qk_rope_head_dim)


def positions_of(config: Any) -> int | None:
    """The longest row that a model's positions allow, if there is a limit."""
    return getattr(config, "max_position_embeddings", None)


def multiplier_of(config: Any, layer: nn.Module) -> float:
    """The factor between what a module of a filled block gives and the residual stream behind the block."""
    family = family_of(config)
    own = 1.0 if family.scalar is None else float(layer.get_buffer(family.scalar))
    return own if family.multiplier is None else own * float(getattr(config, family.multiplier))


def activation_of(config: Any, layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The function between the two levels of a filled block's feed-forward."""
    family = family_of(config)
    if family.activation is not None:
        return layer.get_submodule(".".join(filter(None, (family.feed_forward, family.activation))))
    names = ("hidden_activation", "activation_function", "hidden_act")
    # LFM2's config does not say.
    return ACT2FN[next((value for name in names if (value := getattr(config, name, None))), "silu")]
