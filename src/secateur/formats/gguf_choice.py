"""Which of llama.cpp's architectures computes a model, and what keeps the others from it.

A model takes the first one on its family's list that computes the same.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.base.errors import SecateurError
from secateur.families.entry import Family, Gguf
from secateur.families.registry import family_of, gguf_of
from secateur.formats.gguf_architectures import (
    ACTIVATIONS,
    ARCHITECTURES,
    LEVEL2,
    SWIGLU_LIMIT,
    TYPES,
    Architecture,
)
from secateur.formats.per_layer import dense_channels
from secateur.model.axes import Width, alike
from secateur.model.checkpoint import Checkpoint
from secateur.model.facts import head_dim, positions_of
from secateur.model.units.channels import CHANNELS


@dataclass
class Model:
    """A stored model, as far as the choice of an architecture asks."""

    checkpoint: Checkpoint
    widths: list[Width]
    added_biases: frozenset[str] = frozenset()
    """Of layers that will get one, where the model is still to be pruned."""
    family: Family = field(init=False)
    source: Gguf = field(init=False)
    inside: list[dict[str, str]] = field(init=False)
    """By block: name inside the block → stored name."""
    outside: dict[str, str] = field(init=False)
    """The language model's name of each of its other tensors → stored name."""

    def __post_init__(self) -> None:
        kind = getattr(self.config, "twin_of", self.config.model_type)
        self.source, self.family = gguf_of(self.config), family_of(self.config)
        around = (self.checkpoint.around or {}).get("model_type")
        if other := self.source.unlike_inside.get(str(around)) or self.source.unlike:
            raise SecateurError(
                f"{self.checkpoint.source}: llama.cpp's {kind} {other}, unlike the model; keep the safetensors folder"
            )
        if not self.source.architectures:
            raise SecateurError(
                f"{self.checkpoint.source}: llama.cpp has no architecture for {kind}; keep the safetensors folder"
            )
        # Configs have no common way to say which blocks have no experts.
        self.widths = [
            width.without_experts(dense_channels(self.config, index))
            if width.experts and not self.checkpoint.holds_experts(self.parameter(index, "down_proj"))
            else width
            for index, width in enumerate(self.widths)
        ]
        self.inside, self.outside = [{} for _ in self.widths], {}
        in_block = re.compile(rf"(?:.*\.)?{self.family.blocks.rpartition('.')[2]}\.(\d+)\.(.+)")
        for stored in self.checkpoint.weights:
            name = self.checkpoint.own_name(stored)
            if name is not None and (match := in_block.fullmatch(name)):
                self.inside[int(match[1])][match[2]] = stored
            elif name is not None:
                self.outside[name] = stored
        # Where something else stands in the attention's place, heads are a number alone: that of the others.
        own = next((width for index, width in enumerate(self.widths) if not self.mixes(index)), None)
        self.widths = [
            width.taking("heads", own) if own and self.mixes(index) else width
            for index, width in enumerate(self.widths)
        ]

    @property
    def config(self) -> Any:
        """The config object."""
        return self.checkpoint.config

    @property
    def dim(self) -> int:
        """Entries per head."""
        return head_dim(self.config)

    def heads_of(self, index: int) -> tuple[int, int]:
        """Entries per head and key/value heads of a block, where blocks with a window have others (Gemma 4)."""
        kinds = self.config.layer_types
        names = [f"{self.family.attention}.{own}.weight" for own in ("q_norm", "k_proj")]
        # The last blocks may have no keys; earlier ones of their kind have.
        alike = (own for own, kind in zip(self.inside, kinds, strict=True) if kind == kinds[index])
        first = next(own for own in alike if names[1] in own)
        dim, rows = (self.checkpoint.tensors[first[name]].shape[0] for name in names)
        return dim, rows // dim

    @property
    def positions(self) -> int:
        """How many the config allows; those whose attention fades with the distance call them otherwise, or not."""
        others = (getattr(self.config, key, None) for key in ("max_seq_len", "seq_length"))
        return int(positions_of(self.config) or next(filter(None, others), 2048))

    @property
    def fused(self) -> tuple[str, bool] | None:
        """The one layer for queries, keys and values, and whether it holds them group by group."""
        family = self.family
        return None if family.fused is None else (family.fused, family.interleaved)

    @property
    def value_dim(self) -> int:
        """Entries that a head hands to the output layer."""
        return self.dim if self.family.latent is None else int(self.config.v_head_dim)

    @property
    def rope(self) -> dict[str, Any]:
        """Rotary settings of layers without a window; empty where positions are learned."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        return rope.get("full_attention", rope)

    @property
    def kind(self) -> str:
        """The kind of rotary scaling."""
        return self.rope.get("rope_type", "default")

    @property
    def rotated(self) -> int:
        """Rotated entries of a head; of proportional ones some have the frequency zero."""
        return self.dim if self.kind == "proportional" else int(self.dim * self.rope.get("partial_rotary_factor", 1.0))

    @property
    def window(self) -> int | None:
        """How many positions a layer with a sliding window sees; None where no layer has one."""
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        return None if kinds and "sliding_attention" not in kinds else window

    @property
    def period(self) -> int | None:
        """Every how many blocks one has full attention, and those before it windows or a linear one; 0 for never, None
        where there is no such number."""
        kinds = [kind in ("sliding_attention", "linear_attention") for kind in self.config.layer_types]
        count = len(kinds)
        return next((p for p in range(count + 1) if kinds == [not p or i % p < p - 1 for i in range(count)]), None)

    @property
    def layers(self) -> dict[str, str]:
        """llama.cpp's names of the layers that pruning cuts → names inside a block; fused ones appear again."""
        family = self.family
        feed = "" if family.feed_forward is None else f"{family.feed_forward}."
        qkv = (self.fused[0],) * 3 if self.fused else (family.queries, family.keys, family.values)
        attention = dict(zip(("attn_q", "attn_k", "attn_v"), qkv, strict=True)) if family.latent is None else {}
        names = {
            layer: f"{family.attention}.{name}" for layer, name in (attention | {"attn_output": family.output}).items()
        }
        if family.experts is not None and family.mixture and all(width.experts for width in self.widths):
            return names
        if gate := family.fused_gate or family.gate:
            names["ffn_gate"] = feed + gate
        return names | {"ffn_up": feed + (family.fused_gate or family.up), "ffn_down": feed + family.down}

    def fed(self, width: Width) -> int:
        """Channels of a block's feed-forward, also of one that stands beside experts."""
        parallel = width.experts and not self.family.mixture
        return int(self.config.intermediate_size) if parallel else width.channels

    def mixes(self, index: int) -> bool:
        """Whether something else stands in the place of a block's attention."""
        mixer = self.family.token_mixer
        return mixer is not None and any(name.startswith(f"{mixer.path}.") for name in self.inside[index])

    @property
    def normed(self) -> bool:
        """Whether the gates of what a token meets add up to one."""
        always = None if self.family.experts is None else self.family.experts.gates_sum_to_one
        return bool(self.config.norm_topk_prob) if always is None else always

    def parameter(self, index: int, leaf: str) -> str:
        """What transformers calls one of the tensors of a block's experts."""
        assert self.family.experts is not None
        return f"{self.family.blocks}.{index}.{self.family.mixture}{self.family.experts.experts}.{leaf}"

    @property
    def biases(self) -> frozenset[str]:
        """Layers with a bias in some block."""
        stored = set().union(*self.inside)
        return self.added_biases | {layer for layer, name in self.layers.items() if f"{name}.bias" in stored}


def filled(channels: int, type: str) -> int:
    """Channels of whole rows. llama.cpp's graphs leave a block without any before its attention has been added."""
    multiple = TYPES[type].multiple
    return max(1, -(-channels // multiple)) * multiple


def in_file(width: Width, type: str) -> Width:
    """A width as a file has it."""
    return width if width.experts else width | {CHANNELS: filled(width.channels, type)}


def choose(model: Model, type: str) -> Architecture:
    """The first architecture that computes the model.

    Raises:
        SecateurError: there is none; with what each one lacks and what would fit.
    """
    check_type(type)
    reasons = []
    # An architecture that leaves heads out comes first where there are none, as others keep an idle one.
    headless = any(not width.heads for width in model.widths)
    for name in sorted(model.source.architectures, key=lambda name: headless and not ARCHITECTURES[name].headless):
        reason = _obstacle(model, ARCHITECTURES[name], type)
        if reason is None:
            return ARCHITECTURES[name]
        reasons.append(f"{name} {reason}")
    raise SecateurError(
        f"{model.checkpoint.source}: no architecture of llama.cpp holds this model: {'; '.join(reasons)}"
    )


def check_type(type: str) -> None:
    """Raise `SecateurError` for a type that cannot be written, with the way to llama.cpp's others."""
    if type in TYPES:
        return
    if type.lower() in TYPES:
        raise SecateurError(f"type is '{type}'; write it {type.lower()}")
    known = ", ".join(TYPES)
    if re.fullmatch(r"i?q\d_.+", type.lower()):
        raise SecateurError(
            f"type {type} is made by llama.cpp's own llama-quantize from a file of type f16 or bf16; its K-quants take "
            f"rows that 256 divides, so prune with --round 256 (types here: {known})"
        )
    raise SecateurError(f"no type {type!r}; choose one of {known}")


def _obstacle(model: Model, architecture: Architecture, type: str) -> str | None:
    """What an architecture lacks for a model, as the rest of a sentence that begins with its name."""
    config, hidden = model.config, model.config.hidden_size
    widths = [in_file(width, type) for width in model.widths]
    experts = [bool(width.experts) for width in widths]
    around = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention", {})
    activation = getattr(config, model.source.activation, model.source.activation)
    extra = model.biases - architecture.biases
    tied = bool(config.tie_word_embeddings)
    if not alike(widths) and not architecture.per_layer:
        return "has one width for all blocks, so prune all of them with uniform widths"
    if experts != sorted(experts) or (not all(experts) and any(experts) and not architecture.leading):
        return "has experts in all blocks" + (" behind the first ones" if architecture.leading else "")
    if len({(width.experts, width.channels) for width in widths if width.experts}) > 1:
        return "has as many experts in all blocks that have some, and as many channels in all experts"
    if any(experts) and architecture.normed not in (None, model.normed):
        return "makes gates add up to one" if architecture.normed else "leaves gates as they are"
    if architecture.ungrouped and widths[0].groups != widths[0].heads:
        return "has as many key/value heads as query heads"
    if architecture.latent and (reason := _latent_obstacle(model, architecture)):
        return reason
    if architecture.square and widths[0].heads * model.dim != hidden:
        return f"wants heads x head size = {hidden}, so all {hidden // model.dim} heads"
    if activation not in ACTIVATIONS[architecture.activation]:
        return f"computes {architecture.activation}, not {activation}"
    if extra:
        return f"has no place for the biases of {', '.join(sorted(extra))}"
    if model.kind not in architecture.scalings:
        return f"does not know {model.kind} rotary scaling"
    if architecture.name == "smollm3" and config.no_rope_layers != [int((i + 1) % 4 != 0) for i in range(len(widths))]:
        return "leaves positions out in every fourth block"
    if architecture.name == "exaone4" and (model.window is None) is (len(widths) == 64):
        return "has windows in models of 64 blocks, and in no others"
    if architecture.name == "llama4" and (reason := _llama4_obstacle(config, widths)):
        return reason
    if architecture.name == "gpt-oss":
        # Files that others make of it are rounded as well.
        if model.window is None or model.period != 2:
            return "has a window in every other block, the first one among them"
        if config.swiglu_limit != SWIGLU_LIMIT:
            return f"limits what experts compute to {SWIGLU_LIMIT:g}, and this model to {config.swiglu_limit:g}"
    elif model.kind == "yarn" and model.rope.get("truncate") is False:
        return "rounds the limits of yarn, which this model does not (truncate)"
    if around.get("rope_type", "default") != "default":
        return "does not scale the rotation of layers with a window"
    if model.rotated != model.dim and not architecture.partial:
        return f"rotates whole heads, and here {model.rotated} of {model.dim} entries are"
    if model.rotated % 2:
        return f"rotates entries of a head by pairs, and here {model.rotated} are"
    if architecture.linear and not model.period:
        return "has full attention at regular intervals, and linear attention before each of them"
    if architecture.linear and config.linear_key_head_dim != config.linear_value_head_dim:
        return "has keys and values of linear attention of one size"
    if model.family.heads_by_layer_type and (reason := _mixed_obstacle(model)):
        return reason
    if architecture.windows and model.window is not None and not model.period and not model.family.heads_by_layer_type:
        return "has windows at regular intervals only, and blocks without between them"
    if architecture.name in ("cohere2", "exaone-moe") and model.window is None:
        return "has windows in some blocks, and turns positions there"
    if architecture.name == "olmo2" and around and around["rope_theta"] != model.rope["rope_theta"]:
        return "turns positions of all blocks equally fast"
    if architecture.name == "command-r" and config.use_qk_norm != (len(widths) >= 64):
        return "norms queries and keys in models of 64 blocks and more, and in no others"
    if getattr(config, "qk_layernorm", False):
        return "has no place here for norms of queries and keys"
    if architecture.name == "falcon" and (config.alibi or not config.parallel_attn):
        return "turns positions, and has both modules beside each other"
    if architecture.name == "bloom" and config.apply_residual_connection_post_layernorm:
        return "adds to what has not been normed"
    if getattr(config, "conv_bias", False):
        return "has no place for the biases of convolutions"
    if architecture.name == "lfm2moe" and (not config.use_expert_bias or config.routed_scaling_factor != 1):
        return "has a bias of the choice, and multiplies gates by nothing"
    if architecture.name == "mpt" and config.attn_config.softmax_scale is not None:
        return "takes the scale of attention scores from the head size"
    if architecture.output == "tied" and not tied:
        return "has the embedding for its output matrix, and this model has another one (tie_word_embeddings)"
    if architecture.name == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        return "caps logits, which this model does not"
    if architecture.name != "gemma2" and getattr(config, "attn_logit_softcapping", None):
        return "does not cap attention logits, which this model does"
    return None


def _latent_obstacle(model: Model, architecture: Architecture) -> str | None:
    """What the graph of latent attention lacks."""
    config, rope = model.config, model.rope
    if not min(width.heads for width in model.widths):
        return "has heads in all blocks"
    if not config.q_lora_rank and len(model.widths) not in (26, 27):
        return "has a latent vector for queries too, but in models of 26 and 27 blocks"
    if getattr(config, "attention_bias", False):
        return "has no place for the biases of what makes latent vectors"
    if not getattr(config, "rope_interleave", True):
        return "rotates neighbouring entries of a head, unlike this model"
    if model.kind == "yarn" and (rope.get("mscale_all_dim") or 0) != rope.get("mscale"):
        return "takes yarn's mscale and mscale_all_dim for the same number"
    if model.kind == "yarn" and architecture.name == "mistral4" and rope["mscale"] != 1:
        return "takes yarn's mscale for 1"
    experts = model.family.experts
    if experts is not None and experts.gating == "softmax" and getattr(config, "topk_method", "greedy") != "greedy":
        return "chooses groups of experts by their best two, and this model by their best"
    return None


def _mixed_obstacle(model: Model) -> str | None:
    """What is fixed in the graph of Gemma 4."""
    config, kinds = model.config, model.config.layer_types
    if not min(width.heads for width in model.widths):
        return "has heads in all blocks"
    if model.window is None or "full_attention" not in kinds:
        return "has windows in some blocks"
    shared = config.num_kv_shared_layers
    if shared and kinds[: len(kinds) - shared][-2:] != ["sliding_attention", "full_attention"]:
        return "takes shared keys and values from two blocks, first one with a window and then one without"
    if config.hidden_size_per_layer_input and config.vocab_size_per_layer_input != config.vocab_size:
        return "reads inputs of blocks for all tokens (vocab_size_per_layer_input)"
    if config.use_bidirectional_attention == "all":
        return "does not look ahead"
    return None


def _llama4_obstacle(config: Any, widths: Sequence[Width]) -> str | None:
    """What is fixed in the graph of Llama 4."""
    fixed: dict[str, Any] = {
        "attention_chunk_size": 8192,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
    }
    fixed["no_rope_layers"] = [int((i + 1) % 4 != 0) for i in range(len(widths))]
    # It tells Maverick, which has no such norms, by the number of its experts.
    fixed["use_qk_norm"] = widths[0].experts != 128
    other = next((key for key, value in fixed.items() if getattr(config, key) != value), None)
    return None if other is None else f"takes {other} for {fixed[other]} here"


def gguf_obstacle(
    checkpoint: Checkpoint, widths: Sequence[Width], type: str = "f16", *, biases: bool = False
) -> str | None:
    """Why no GGUF file of a type can hold a model, pruned or not, at the widths of its blocks, or None.

    Reads no weights. With `biases`, the output layers of both modules get some.
    """
    try:
        choose(Model(checkpoint, list(widths), LEVEL2 if biases else frozenset()), type)
    except SecateurError as error:
        return str(error).removeprefix(f"{checkpoint.source}: ")
    return None
