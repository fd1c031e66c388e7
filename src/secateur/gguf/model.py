"""A stored model in the form that the GGUF format needs: its family's entry, block sizes and tensor names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.base.errors import SecateurError
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.checkpoints.facts import head_dim, positions_of
from secateur.families.family import Experts
from secateur.families.registry import family_of, gguf_of
from secateur.gguf.positions import pattern_of, rope_kind, rope_of
from secateur.gguf.types import storage_of
from secateur.model.axes import Width, model_width
from secateur.model.units.channels import CHANNELS
from secateur.model.units.experts import EXPERT_CHANNELS, EXPERTS
from secateur.model.units.heads import HEADS, KV_GROUPS

STATED_AXES = frozenset({*HEADS, CHANNELS, EXPERTS, EXPERT_CHANNELS})
"""Axes whose numbers of units a GGUF file states."""


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of one block."""

    heads: int
    """Number of query heads."""
    kv_heads: int
    """Number of key/value heads."""
    channels: int | None
    """Channels of the feed-forward; None if the block has experts instead."""
    experts: int
    """Number of experts; zero in a block without any."""
    expert_channels: int
    """Channels of each expert."""
    head_dim: int
    """Entries of a query head and of a key head."""
    value_dim: int
    """Entries of a head in the input of the output layer."""


def filled(channels: int, multiple: int) -> int:
    """Return the number of channels in a file: a multiple of a number, and not zero.

    In a block without channels, llama.cpp would not add the attention's output to the residual stream.
    """
    return max(1, -(-channels // multiple)) * multiple


QKV = ("attn_q", "attn_k", "attn_v")
"""llama.cpp's names of the layers of queries, keys and values."""


class GgufModel:
    """A stored model, or the plan of one.

    Attributes:
        storage: Types of the tensors in the file.
        source: The family's entry for GGUF files.
        shapes: Shapes of tensors that will be narrower than the checkpoint's, by transformers' names and by stored
            names.
        inside: Stored names of each block's tensors, by their names inside the block.
        outside: Stored names of the other tensors of the language model, by its names for them.
        blocks: Sizes of each block.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        widths: Sequence[Width],
        added_biases: frozenset[str] = frozenset(),
        type: str = "f16",
    ):
        """List the tensors.

        Args:
            checkpoint: The stored model.
            widths: Width of each block.
            added_biases: llama.cpp's names of layers that will get a bias when the model is pruned.
            type: Type of the file.

        Raises:
            SecateurError: The type cannot be written, llama.cpp has no architecture for the family, or it computes
                something else than the family's class.
        """
        self.checkpoint, self.widths, self.added_biases = checkpoint, widths, added_biases
        self.config: Any = checkpoint.config
        self.storage = storage_of(type, checkpoint)
        self.source, self.family = gguf_of(self.config), family_of(self.config)
        self._check_family()
        self.shapes = dict[str, tuple[int, ...]]()
        self.inside: list[dict[str, str]] = [{} for _ in widths]
        self.outside = dict[str, str]()
        in_block = re.compile(rf"(?:.*\.)?{self.family.blocks.rpartition('.')[2]}\.(\d+)\.(.+)")
        for stored in checkpoint.weights:
            name = checkpoint.own_name(stored)
            if name is not None and (match := in_block.fullmatch(name)):
                self.inside[int(match[1])][match[2]] = stored
            elif name is not None:
                self.outside[name] = stored
        self.blocks = [self.sizes(index, width) for index, width in enumerate(widths)]

    def _check_family(self) -> None:
        """Raise `SecateurError` for a family that llama.cpp does not compute."""
        kind = getattr(self.config, "twin_of", self.config.model_type)
        outer = str((self.checkpoint.multimodal_config or {}).get("model_type"))
        if other := self.source.difference_inside.get(outer) or self.source.difference:
            raise SecateurError(
                f"{self.checkpoint.source}: llama.cpp's {kind} {other}, unlike the model; keep the safetensors folder"
            )
        if not self.source.architectures:
            raise SecateurError(
                f"{self.checkpoint.source}: llama.cpp has no architecture for {kind}; keep the safetensors folder"
            )

    def sizes(self, index: int, width: Width) -> BlockSizes:
        """Return the sizes of a block at a width.

        Blocks with a token mixer have no heads, but GGUF files state the number of heads of the other blocks for them.
        """
        usual = {axis: number for axis, number in model_width(self.widths).items() if axis in HEADS}
        width = Width({**usual, **width})
        channels, experts = width.get(CHANNELS), width.get(EXPERTS, 0)
        if experts and not self.family.mixture:
            channels = int(self.config.intermediate_size)
        heads, kv_heads = width.product(HEADS) if KV_GROUPS in width else 0, width.get(KV_GROUPS, 0)
        dim = self.dim
        if self.family.heads_by_layer_type and heads:
            dim, kv_heads = self._heads_of_type(self.config.layer_types[index])
        value_dim = dim if self.family.latent is None else int(self.config.v_head_dim)
        return BlockSizes(heads, kv_heads, channels, experts, width.get(EXPERT_CHANNELS, 0), dim, value_dim)

    def _heads_of_type(self, layer_type: str) -> tuple[int, int]:
        """Return the head size and the number of key/value heads of blocks of one type (Gemma 4)."""
        norm, keys = (f"{self.family.attention}.{name}.weight" for name in ("q_norm", "k_proj"))
        # The last blocks may use the keys of earlier blocks of their type.
        same_type = (
            inside for inside, kind in zip(self.inside, self.config.layer_types, strict=True) if kind == layer_type
        )
        first = next(inside for inside in same_type if keys in inside)
        dim, rows = (self.shape_of(first[name])[0] for name in (norm, keys))
        return dim, rows // dim

    def shape_of(self, stored: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor."""
        return self.shapes.get(stored) or self.checkpoint.tensors[stored].shape

    @property
    def dim(self) -> int:
        """Entries per head; if blocks differ, the number of most blocks."""
        return head_dim(self.config)

    @property
    def positions(self) -> int:
        """Number of positions that the config allows. Configs of models with ALiBi have another key for it, or none."""
        others = (getattr(self.config, key, None) for key in ("max_seq_len", "seq_length"))
        return int(positions_of(self.config) or next(filter(None, others), 2048))

    @property
    def rotated(self) -> int:
        """Number of rotated entries of a head. The kind `proportional` rotates all entries, some of them with the
        frequency zero."""
        proportional = rope_kind(self.config) == "proportional"
        return int(self.dim * (1.0 if proportional else rope_of(self.config).get("partial_rotary_factor", 1.0)))

    @property
    def window(self) -> int | None:
        """Number of positions in a sliding window; None if no layer has a window."""
        types = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        return None if types and "sliding_attention" not in types else window

    @property
    def period(self) -> int | None:
        """Distance between blocks with full attention. The blocks before each of them have windows or linear attention.

        0 means that no block has full attention; None means that the distance varies.
        """
        return pattern_of([kind in ("sliding_attention", "linear_attention") for kind in self.config.layer_types])

    @property
    def layers(self) -> dict[str, str]:
        """Names inside a block of the layers that pruning narrows, by llama.cpp's names.

        A fused layer has an entry for each of its parts.
        """
        family = self.family
        qkv = (family.fused,) * 3 if family.fused else (family.queries, family.keys, family.values)
        attention = {} if family.latent else dict(zip(QKV, qkv, strict=True))
        attention["attn_output"] = family.output
        names = {layer: f"{family.attention}.{name}" for layer, name in attention.items()}
        if all(sizes.channels is None for sizes in self.blocks):
            return names
        feed_forward = "" if family.feed_forward is None else f"{family.feed_forward}."
        channels = {
            "ffn_gate": family.fused_gate or family.gate,
            "ffn_up": family.fused_gate or family.up,
            "ffn_down": family.down,
        }
        return names | {layer: feed_forward + name for layer, name in channels.items() if name}

    def is_token_mixer(self, index: int) -> bool:
        """Return whether a block has a token mixer in the attention's place."""
        mixer = self.family.token_mixer
        return mixer is not None and any(name.startswith(f"{mixer.path}.") for name in self.inside[index])

    @property
    def first_experts(self) -> int | None:
        """Index of the first block with experts; None if there is none."""
        return next((index for index, sizes in enumerate(self.blocks) if sizes.experts), None)

    @property
    def gates_sum_to_one(self) -> bool:
        """Whether the model divides the gates of a token's experts by their sum."""
        always = self.source.gates_sum_to_one
        return bool(self.config.norm_topk_prob) if always is None else always

    @property
    def experts(self) -> Experts:
        """Entry of the family's mixtures of experts, for a model that has some."""
        assert self.family.experts is not None
        return self.family.experts

    @property
    def biases(self) -> frozenset[str]:
        """llama.cpp's names of the layers that have a bias in some block."""
        stored = set().union(*self.inside)
        return self.added_biases | {layer for layer, name in self.layers.items() if f"{name}.bias" in stored}
