"""Entry of one of llama.cpp's architectures: the models that it computes, and the form of its files.

An architecture is the code by which llama.cpp computes models of one kind. A file names its architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from secateur.formats.gguf_model import GgufModel
from secateur.formats.gguf_sizes import BlockSizes
from secateur.formats.gguf_specifics import head_sizes, no_windows, same_scale
from secateur.model.gguf_layout import Order
from secateur.model.gguf_rope import Sections

Requirement = Callable[[GgufModel, "Architecture"], str | None]
"""Function that returns None for a model that an architecture computes; else why it does not, as the rest of a sentence
that begins with the architecture's name."""
Metadata = Callable[[GgufModel], Mapping[str, Any]]
"""Function that returns metadata of a model, by keys without the architecture; a value of None leaves the key out."""

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
    """Whether blocks without heads have no attention in the file; if not, they keep one head that adds nothing."""
    square: bool = False
    """Whether heads x head size must be the width of the residual stream."""
    ungrouped: bool = False
    """Whether every query head must have its own key/value head."""
    pairs: bool = False
    """Whether neighbouring entries of a head rotate together, not entries half a head apart."""
    head_norms: bool = False
    """Whether queries and keys of every head are normalised."""
    fused_qkv: bool = False
    """Whether queries, keys and values are one tensor: first the rows of all queries, then keys, then values."""
    fused_gate: bool = False
    """Whether gate and up layer are one tensor: first the rows of the gate."""
    scalings: frozenset[str] = SCALINGS
    """Kinds of rotary scaling."""
    partial: bool = False
    """Whether a part of each head may stay unrotated."""
    windows: Metadata = no_windows
    """Metadata of sliding windows."""
    windows_by_block: bool = False
    """Whether any block may have a window; if not, blocks without a window lie at regular distances."""
    output: Literal["either", "tied", "stored"] = "either"
    """The output matrix: the embedding where none is stored; always the embedding; or always stored."""
    activation: Literal["silu", "gelu", "relu2", "xielu"] = "silu"
    epsilon: Literal["layer_norm_rms_epsilon", "layer_norm_epsilon"] = "layer_norm_rms_epsilon"
    """Metadata key of the epsilon of norms."""
    final_norm: str | None = "output_norm.weight"
    """Name of the final norm's tensor; None where norms have no weights."""
    alibi: bool = False
    """Whether attention scores fall with the distance (ALiBi), and nothing rotates."""
    gates_sum_to_one: bool | None = None
    """Whether the gates of a token's experts are divided by their sum; None where the file decides."""
    leading_dense: bool = False
    """Whether the first blocks may have a feed-forward where the others have experts."""
    linear: Order | None = None
    """Order of the value heads of linear attention, which stands in the attention's place except in every nth block;
    None where there is none."""
    sections: Sections | None = None
    """Order of the frequencies for time, height and width of a picture; None where a position is one number."""
    latent: bool = False
    """Whether all heads share a latent vector per token, from which two matrices compute keys and values."""
    attention: Metadata = head_sizes
    """Metadata of head sizes."""
    metadata: tuple[Metadata, ...] = ()
    """Metadata that only some architectures have."""
    requirements: tuple[Requirement, ...] = ()
    """Requirements that the fields above do not express."""
    score_ratio: Callable[[GgufModel, int], float] = same_scale
    """Function that returns the model's scale of a block's attention scores, divided by llama.cpp's."""
    rounds_yarn: bool = True
    """Whether the range of frequencies that yarn scales has rounded limits."""
    caps_scores: bool = False
    """Whether attention scores are capped (`attn_logit_softcapping`)."""
    states_routing: bool = False
    """Whether files state how gates are computed even where `gates_sum_to_one` is not None."""

    @property
    def has_windows(self) -> bool:
        """Whether layers may have sliding windows; elsewhere every layer sees all positions."""
        return self.windows is not no_windows

    def sizes(self, model: GgufModel, type: str) -> list[BlockSizes]:
        """Return the sizes of each block in a file of a type, with filled rows, and idle heads where needed."""
        return [
            replace(sizes, heads=sizes.heads or idle, kv_heads=sizes.kv_heads or idle).filled(type)
            for idle, sizes in zip(self._idle_heads(model), model.blocks, strict=True)
        ]

    def _idle_heads(self, model: GgufModel) -> list[int]:
        """Return the number of heads of each block that has lost all of its heads."""
        output = model.layers["attn_output"]
        biased = ["attn_output" in model.added_biases or f"{output}.bias" in inside for inside in model.inside]
        # llama.cpp reads the size of heads from the first block.
        return [int(not self.headless or index == 0 or bias) for index, bias in enumerate(biased)]
