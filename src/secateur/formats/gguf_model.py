"""A stored model, as far as a GGUF file depends on it."""

import re
from dataclasses import dataclass, field
from typing import Any

from secateur.base.errors import SecateurError
from secateur.families.entry import Family, Gguf
from secateur.families.registry import family_of, gguf_of
from secateur.formats.per_layer import dense_channels
from secateur.model.axes import Width
from secateur.model.checkpoint import Checkpoint
from secateur.model.facts import head_dim, positions_of


@dataclass
class GgufModel:
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
    def window_rope(self) -> dict[str, Any]:
        """Rotary settings of layers with a window, where they have their own."""
        return (getattr(self.config, "rope_parameters", None) or {}).get("sliding_attention", {})

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
