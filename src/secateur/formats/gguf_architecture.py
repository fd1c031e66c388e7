"""Entry of one of llama.cpp's architectures: which models it computes, and how its files are laid out.

An architecture is the code by which llama.cpp computes models of one kind. A file names its architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from secateur.formats.gguf_model import GgufModel
from secateur.formats.gguf_sizes import BlockSizes
from secateur.formats.gguf_specifics import head_sizes, no_windows, same_scale
from secateur.model.gguf_layout import Order
from secateur.model.gguf_rope import Sections

Requirement = Callable[[GgufModel, "Architecture"], str | None]
"""Function that returns why an architecture does not compute a model, as the rest of a sentence that begins with the
architecture's name; None if it does."""
Metadata = Callable[[GgufModel], Mapping[str, Any]]
"""Function that returns metadata of a model, by keys without the architecture. Keys with the value None are not
written."""

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
    head_norms: bool = False
    """Whether queries and keys of every head are normalised."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Layers that are one tensor in the file, in the order of their rows, by the name of that tensor."""
    scalings: frozenset[str] = SCALINGS
    """Kinds of rotary scaling."""
    partial: bool = False
    """Whether a part of each head may stay unrotated."""
    windows: Metadata = no_windows
    """Metadata of sliding windows."""
    windows_by_block: bool = False
    """Whether any block may have a window; otherwise blocks without a window are at regular distances."""
    output: Literal["either", "tied", "stored"] = "either"
    """Output matrix of the model. `tied`: always the embedding. `stored`: always a matrix in the file. `either`: the
    matrix in the file, or the embedding if there is none."""
    activation: Literal["silu", "gelu", "relu2", "xielu"] = "silu"
    epsilon: Literal["layer_norm_rms_epsilon", "layer_norm_epsilon"] = "layer_norm_rms_epsilon"
    """Metadata key of the epsilon of norms."""
    final_norm: str | None = "output_norm.weight"
    """Name of the final norm's tensor; None if norms have no weights."""
    alibi: bool = False
    """Whether attention scores decrease with the distance (ALiBi) instead of rotary embeddings."""
    leading_dense: bool = False
    """Whether the first blocks may have a feed-forward although later blocks have experts."""
    linear: Order | None = None
    """Order of the value heads of linear attention, which all blocks but every nth have instead of attention; None
    without linear attention."""
    sections: Sections | None = None
    """Order of the rotary frequencies for time, height and width of a picture; None if all frequencies use the same
    position."""
    latent: bool = False
    """Whether the attention is latent attention: all heads compute keys and values from one latent vector per token."""
    attention: Metadata = head_sizes
    """Metadata of head sizes."""
    metadata: tuple[Metadata, ...] = ()
    """Metadata that only some architectures have."""
    requirements: tuple[Requirement, ...] = ()
    """Requirements that the fields above do not express."""
    score_ratio: Callable[[GgufModel, int], float] = same_scale
    """Function that returns the model's scale of a block's attention scores, divided by llama.cpp's."""
    caps_scores: bool = False
    """Whether attention scores are capped (`attn_logit_softcapping`)."""
    clamps: bool = False
    """Whether queries, keys and values may be clipped (`clip_qkv`)."""
    states_routing: bool = False
    """Whether files state how gates are computed although `GATES_SUM_TO_ONE` lists the architecture."""

    @property
    def has_windows(self) -> bool:
        """Whether layers may have sliding windows; otherwise every layer attends to all positions."""
        return self.windows is not no_windows

    def sizes(self, model: GgufModel) -> list[BlockSizes]:
        """Return the sizes of each block in the file, including channels that fill rows, and idle heads."""
        return [
            replace(sizes, heads=sizes.heads or idle, kv_heads=sizes.kv_heads or idle).filled(model.storage.block)
            for idle, sizes in zip(self._idle_heads(model), model.blocks, strict=True)
        ]

    def _idle_heads(self, model: GgufModel) -> list[int]:
        """Return the number of idle heads that each block gets if it has no heads: 0 or 1."""
        output = model.layers["attn_output"]
        biased = ["attn_output" in model.added_biases or f"{output}.bias" in inside for inside in model.inside]
        # llama.cpp reads the size of heads from the first block.
        return [int(not self.headless or index == 0 or bias) for index, bias in enumerate(biased)]
