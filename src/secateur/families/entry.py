"""The entry of a model family: facts about llama.cpp, vLLM and older spellings, which a class does not tell.

How the blocks of a family are laid out is derived from its class; see `secateur.layout.derive`. An entry states what
cannot be derived.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Stock:
    """Other spellings of a family's config: in its own checkpoints, in transformers 4.57, and of another class that
    takes widths which the family's class refuses."""

    channels_aliases: tuple[str, ...] = ()
    """Further config keys that hold the feed-forward width in the family's own checkpoints."""
    fixed_values: tuple[tuple[str, Any], ...] = ()
    """Config keys and values with which the class uses the written width unchanged."""
    fallback: tuple[str, str] | None = None
    """model_type and class that compute the same and accept the numbers of heads that this class refuses."""
    fallback_values: tuple[tuple[str, Any], ...] = ()
    """Config keys and values with which the fallback computes the same as this class."""
    theta_key: str | None = "rope_theta"
    """Config key of the rotary base in transformers 4.57; None if positions are learned."""
    local_theta_key: str | None = None
    """Config key of the rotary base of sliding-window layers in transformers 4.57, if `rope_parameters` in version 5
    has one entry for each layer type."""
    partial_rotary_key: str | None = None
    """Config key of the rotated share of a head in transformers 4.57."""
    per_layer_by_type: bool = False
    """Whether the class reads `per_layer_config` once for each layer type, so that layers of one type cannot differ."""
    scaling_type_key: str = "rope_type"
    """Key inside `rope_scaling` of the kind of scaling, in transformers 4.57."""


@dataclass(frozen=True)
class GgufInput:
    """Facts that secateur needs to read GGUF files of the family, and that metadata and tensor shapes do not give."""

    dense: bool = False
    """Whether secateur also reads files without experts; otherwise transformers reads them."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Pairs of strings: a part of tensor names in the model, and the part that checkpoints have in its place."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Further metadata keys that a file must have, with the config keys of the same values; see `Gguf.keys`."""
    known_keys: frozenset[str] = frozenset()
    """Further metadata keys that a file may have. Either the hook `config` reads them, or tensors give the same
    values."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Values, by config key, that are constants in llama.cpp's code for the architecture."""
    scales_queries: bool = False
    """Whether the class can scale queries by a factor that grows with the position, as some files require."""
    config: Callable[[Any], Mapping[str, Any]] = lambda _: {}
    """Hook that computes further config values from a file, a `secateur.gguf.file.GgufFile`."""


@dataclass(frozen=True)
class Gguf:
    """Facts that secateur needs to write GGUF files of the family for llama.cpp, and to read them."""

    architectures: tuple[str, ...] = ()
    """llama.cpp's architectures that compute the family, the preferred one first."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Metadata keys that only some families have, with the config keys of the same values. They are written, and a file
    that secateur itself reads must have them."""
    difference: str | None = None
    """Clause that says what llama.cpp computes differently from the family's class. If there is one, no file is
    written."""
    difference_inside: Mapping[str, str] = field(default_factory=dict)
    """Clauses like `difference` for decoders inside multimodal models, by model_type of the multimodal model."""
    activation: str = "hidden_act"
    """Config key of the activation function; or the name of the function, if it is a constant of the class."""
    epsilon: str = "rms_norm_eps"
    """Config key of the epsilon of norms."""
    transposed: bool = False
    """Whether checkpoints store matrices inside blocks with inputs first."""
    interleaved_rope: bool = False
    """Whether checkpoints have interleaved rotary embeddings: neighbouring entries of a head rotate together, not
    entries half a head apart."""
    not_read_by_transformers: Mapping[str, str] = field(default_factory=dict)
    """Metadata keys that transformers ignores although the config has a key for the value, with this config key."""
    blocks_of_27b: int | None = None
    """Number of blocks of the 27B model of a Gemma family, by which llama.cpp recognises this model. It scales
    attention scores by hidden_size / heads in this model, and by the head size in the other sizes."""
    token_mixers: str = ""
    """Value in the config's `layer_types` for blocks with a token mixer, which llama.cpp needs beside blocks with
    attention; empty if it needs none."""
    gating: Literal["softmax", "sigmoid"] | None = None
    """Function from a router's logits to gates; None without experts."""
    gates_sum_to_one: bool | None = None
    """Whether the class divides the gates of a token by their sum; None if the config decides (`norm_topk_prob`)."""
    input: GgufInput | None = None
    """Facts that secateur needs to read GGUF files of the preferred architecture; None if transformers reads them."""


@dataclass(frozen=True)
class Vllm:
    """Limits of vLLM for the family. Reasons are clauses that end with what the user can do instead."""

    instead_of_fewer_heads: str | None = None
    """Clause that says what to do instead of removing heads, if vLLM's own class computes the head size as hidden_size
    / heads; else None."""
    backend: str | None = None
    """Reason why vLLM's transformers backend cannot run the family with a different width in each block; None if it
    can."""
    stock: Callable[[Any], str | None] | None = None
    """Hook that returns why vLLM's own class cannot run a config of the family with fewer heads; None if it can."""


@dataclass(frozen=True)
class Entry:
    """Facts about one model_type that its class does not tell."""

    stated: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the description (`secateur.families.family.Family`) that cannot be derived from the class. A mapping
    for `experts` has fields of `Experts`."""
    derived: bool = True
    """Whether the other fields are derived; if not, they have their defaults."""
    stock: Stock = field(default_factory=Stock)
    """Format `stock`: other spellings of the config."""
    gguf: Gguf = field(default_factory=Gguf)
    """Format `gguf`: llama.cpp's architectures and the layout of its files."""
    vllm: Vllm = field(default_factory=Vllm)
    """Limits of vLLM."""


DENSE_HEADS = {"head_counts": "dense"}
"""Statement of an entry whose class computes the head size as hidden_size / heads in transformers 4.57 only."""


@dataclass(frozen=True)
class Twin:
    """Decoder inside multimodal models that has no class for causal language models, and computes the same as a family
    if the input is text alone.

    The decoder's rotary embeddings have separate positions for time, height and width. In text, all three are equal.
    """

    family: str
    """model_type of the family."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Config values with which the family computes the same as the decoder."""
    derives_head_size: bool = False
    """Whether the decoder's class, unlike the family's, computes the head size as hidden_size / heads."""
    inputs_first: bool = False
    """Whether checkpoints may store matrices of experts with inputs first."""
    gguf: Gguf = field(default_factory=Gguf)
    """GGUF files of the decoder; see `Entry.gguf`."""
