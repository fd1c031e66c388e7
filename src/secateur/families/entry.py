"""The entry of a model family: everything that secateur knows of one model_type, as data.

Names of layers are relative to the block, except for `blocks` and `final_norm`. Sizes, biases and the orientation of
stored matrices are read from the block itself (on the meta device), so that most entries are a few names. Where a
family computes something that no field describes, a field takes a function: a hook in the family's own file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import nn


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of the feed-forward, in all blocks or in some."""

    experts: str = "experts"
    """Submodule that holds the matrices of all experts; their first axis is the expert."""
    router: str = "gate"
    """Submodule that chooses the experts of each token and computes their gates."""
    router_bias: str | None = None
    """Attribute of the feed-forward that is handed to the router: a bias on the choice of experts."""
    number: str = "num_experts"
    """Config key of the number of experts."""
    experts_per_token: str = "num_experts_per_tok"
    """Config key of the number of experts per token (top-k)."""
    expert_width: str = "moe_intermediate_size"
    """Config key of the number of channels of each expert."""
    shared_expert: str | None = None
    """Submodule of the shared expert, which is applied to all tokens."""
    shared_expert_gate: str | None = None
    """Submodule that computes the gate of the shared expert; None where its output is added in full."""
    shared_expert_width: str | None = None
    """Config key of the shared expert's width; None where that follows from the width of the other experts."""
    groups: tuple[str, str] | None = None
    """Config keys of the number of groups of experts, and of the number of groups that a token may choose from. All
    groups keep the same number of experts."""
    parallel_norms: tuple[str, str] | None = None
    """Norms before and after the experts, where experts and router are children of the block itself, parallel to a
    feed-forward that is never pruned. The norm after the feed-forward then applies to the sum of both outputs."""
    returns_scores: bool = False
    """Whether the feed-forward returns a tuple: its output, then the router's scores."""
    scales_inputs: bool = False
    """Whether gates multiply the inputs of experts, not their outputs."""
    gating: Literal["softmax", "sigmoid"] = "sigmoid"
    """Function from a router's logits to gates; read where a GGUF file is read or written."""
    gates_sum_to_one: bool | None = None
    """Whether the gates of a token are divided by their sum; None where `norm_topk_prob` in the config decides."""
    stored: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("gate_up_proj", ("gate_proj", "up_proj")),
        ("down_proj", ("down_proj",)),
    )
    """Tensors of `experts`, and the names under which checkpoints store their parts, expert by expert."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Parts of tensor names: the model's, and the checkpoints'."""
    stacked: bool = False
    """Whether checkpoints store the matrices of all experts of a block in one tensor, not expert by expert."""
    inputs_first: bool = False
    """Whether stacked matrices have inputs first (experts x inputs x outputs)."""
    alternating: bool = False
    """Whether stacked matrices hold the outputs of gate and up in turn, and experts have biases."""


@dataclass(frozen=True)
class TokenMixer:
    """A token mixer in the attention's place in some blocks: linear attention or a convolution. It is never pruned."""

    path: str
    """Submodule of the block."""
    output: str
    """Output layer inside that submodule."""
    layer_type: str
    """Name, in the config's `layer_types`, of the blocks with this token mixer."""


class KvSharing(NamedTuple):
    """An attention's part in the sharing of keys and values between blocks."""

    layer_type: str
    """The blocks that share keys and values with each other are of one layer type."""
    lends: bool
    """Whether later blocks attend to the keys and values of this attention; else it attends to those of an earlier
    block."""
    entries: int
    """Entries of a token's keys; its values have as many."""
    head_dim: int
    """Entries per head."""


@dataclass(frozen=True)
class Stock:
    """Spelling of widths and rotary settings in the config class of one model_type, and the widths that the class
    accepts."""

    channels: str = "intermediate_size"
    """Config key of the feed-forward width."""
    derived: bool = False
    """Whether the class derives the feed-forward width and reads no key for it; only the format `hf` can change it."""
    same: tuple[str, ...] = ()
    """Further config keys with the feed-forward width in the family's own checkpoints."""
    also: tuple[tuple[str, Any], ...] = ()
    """Keys and values that make the class take the width as it is written."""
    heads: Literal["any", "divisors", "dense"] = "any"
    """Numbers of heads with which the class loads: any; divisors of hidden_size; or only the dense number, from which
    the class derives the head size."""
    heir: tuple[str, str] | None = None
    """A model_type with the same forward pass that accepts the numbers of heads that this one refuses, and its
    class."""
    heir_keys: tuple[tuple[str, Any], ...] = ()
    """Keys and values of the heir's config that give it this one's forward pass."""
    fused_longrope: bool = False
    """Whether the class checks the number of LongRoPE factors against hidden_size // heads and ignores head_dim."""
    theta: str | None = "rope_theta"
    """Key of the rotary base in transformers 4.57; None where positions are learned."""
    local_theta: str | None = None
    """Key of the rotary base of sliding-window layers in 4.57, where rope_parameters is by layer type."""
    partial: str | None = None
    """Key of the rotated share of a head in 4.57."""
    by_type: bool = False
    """Whether the class reads `per_layer_config` by layer type, so that all layers of one type must be alike there."""
    scaling_type: str = "rope_type"
    """Name of the kind of scaling inside rope_scaling in 4.57."""


class GgufContents(Protocol):
    """A GGUF file, as far as the hook of a family reads it."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata of the architecture, by keys without its name."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Tensors by llama.cpp's names."""

    def common(self, key: str, default: Any = None) -> Any:
        """Return a number that all blocks share; the list of numbers where they differ."""

    def layer_types(self) -> list[str]:
        """Return the type of attention of each block; an empty list where the file does not state it."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, outputs before inputs."""


def no_config(_: GgufContents) -> dict[str, Any]:
    """Return no config values."""
    return {}


@dataclass(frozen=True)
class GgufInput:
    """Facts with which secateur itself reads GGUF files of the family, where metadata and tensor shapes do not give
    them."""

    architecture: str
    """llama.cpp's name of the architecture."""
    dense: bool = False
    """Whether secateur also reads files without experts; else transformers reads them."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Metadata keys that a file must have, and the config's keys of the same values, in addition to `Gguf.keys`."""
    known_keys: frozenset[str] = frozenset()
    """Further metadata keys that a file may have; they are read one by one, or follow from tensors."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Constants in llama.cpp's code for the architecture, by config key."""
    pairs: bool = False
    """Whether neighbouring entries of a head rotate together in files, and entries half a head apart in checkpoints."""
    scales_queries: bool = False
    """Whether the class can scale queries with their positions, as some files require."""
    yarn: Mapping[str, Any] = field(default_factory=dict)
    """Rotary settings with which the class computes yarn as llama.cpp does."""
    config: Callable[[GgufContents], Mapping[str, Any]] = no_config
    """Hook that returns further config values, computed from a file."""
    linear: Literal["grouped", "tiled"] | None = None
    """Order of the value heads of linear attention in files: all of one key head after the other; or the first of every
    key head, then the second ones. Blocks without keys have linear attention."""


@dataclass(frozen=True)
class Gguf:
    """Facts with which GGUF files of the family are written for llama.cpp, and read."""

    architectures: tuple[str, ...] = ()
    """llama.cpp's architectures that compute the family, the preferred one first."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Metadata keys that only some families have, and the config's keys of the same values. They are written, and must
    be there when secateur itself reads a file."""
    unlike: str | None = None
    """Difference between llama.cpp's computation and the family's, as a clause. If there is one, no file is written."""
    unlike_inside: Mapping[str, str] = field(default_factory=dict)
    """The same for decoders inside multimodal models, by the model_type of the multimodal model."""
    activation: str = "hidden_act"
    """Config key of the activation function; or the function itself, where the class fixes it."""
    epsilon: str = "rms_norm_eps"
    """Config key of the epsilon of norms."""
    query_gate: bool = False
    """Whether the query layer also holds rows of a gate on each head's output, after the head's query rows."""
    transposed: bool = False
    """Whether checkpoints store matrices inside blocks with inputs first."""
    pairs: bool = False
    """Whether neighbouring entries of a head rotate together in checkpoints."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Metadata keys that transformers ignores although the config has a key for the value; with these config keys."""
    deepest: int | None = None
    """Number of blocks by which llama.cpp recognises Gemma's 27B models: it scales their attention scores by
    hidden_size / heads, those of the other sizes by the head size."""
    input: GgufInput | None = None
    """Facts with which secateur itself reads GGUF files; None where transformers reads them."""


@dataclass(frozen=True)
class Vllm:
    """Limits of vLLM for the family; each reason is a clause that ends in what can be done instead."""

    derives_head_size: str | None = None
    """Advice on what to do instead of removing heads, where vLLM's own class derives the head size from the number of
    heads; None elsewhere."""
    backend: str | None = None
    """Reason why vLLM's transformers backend cannot run the family with a width for each block; None where it can."""
    stock: Callable[[Any], str | None] | None = None
    """Hook that returns why vLLM's own class cannot run a config of the family with fewer heads; None where it can."""


@dataclass(frozen=True)
class Family:
    """Entry of one model_type: all that secateur knows of the family. Defaults are Llama's."""

    blocks: str = "model.layers"
    attention: str = "self_attn"
    queries: str = "q_proj"
    keys: str = "k_proj"
    values: str = "v_proj"
    output: str = "o_proj"
    fused: str | None = None
    """Fused layer of queries, keys and values; None for three layers."""
    interleaved: bool = False
    """Whether the fused layer holds queries, key and value of one KV group after the other, not all queries first."""
    key_value_heads: Callable[[Any], int] | None = None
    """Number of key/value heads of a config, where that is not its num_key_value_heads."""
    ungrouped: bool = False
    """Whether every query head has its own key/value head. Sizes then follow from the number of heads, whatever else
    the config says."""
    latent: tuple[str, str] | None = None
    """Multi-head latent attention: the layer that makes the latent vector that all heads share, and the layer that
    makes keys and values of it. Queries may be made of such a vector too, by `latent_queries` in place of `queries`."""
    latent_queries: str = "q_b_proj"
    sinks: str | None = None
    """Parameter of the attention with one entry for each query head."""
    feed_forward: str | None = "mlp"
    """Feed-forward submodule; None where its layers are children of the block itself."""
    up: str = "up_proj"
    gate: str | None = "gate_proj"
    down: str = "down_proj"
    fused_gate: str | None = None
    """Fused layer with the rows of the gate, then the rows of the up layer; None for two layers."""
    activation: str | None = None
    """Activation of the feed-forward, where it is a submodule with parameters of its own."""
    final_norm: str = "model.norm"
    """Norm between the last block and the output layer, by its name in the whole model."""
    norm_offset: bool = False
    """Whether norms store their gain minus one."""
    norm_after_attention: str | None = None
    norm_after_feed_forward: str | None = None
    """Norms between the output projection and the residual stream."""
    norm_before_attention: str | None = None
    norm_before_feed_forward: str | None = None
    """Norms between the residual stream and the input projections. They are named only where norms also follow the
    modules: their gains show how strongly later layers read what a module writes."""
    heads_locked: str | None = None
    """Reason why single heads cannot be removed exactly, so that a block keeps all of its heads or none; None where
    they can."""
    locked_by: str | None = None
    """Config key that must be true for heads to be locked; None where they always are."""
    attention_fixed: bool = False
    """Whether the attention cannot be removed as a whole where heads are locked."""
    adds_residual: bool = False
    """Whether the attention and the feed-forward add their outputs to the residual stream themselves."""
    returns_tuple: bool = False
    """Whether blocks return a tuple whose first entry is the residual stream."""
    token_mixer: TokenMixer | None = None
    """Token mixer in the attention's place in some blocks. Heads are removed from the other blocks, channels from
    all."""
    residual_multiplier: str | None = None
    """Config key of a factor between the output of a module and the residual stream."""
    block_multiplier: str | None = None
    """Buffer of the block: a factor on the whole residual stream after the block."""
    per_layer_input: str | None = None
    """Config key of the width of a second input of each block, which depends on the token alone and is added after
    both modules."""
    per_layer_output: str = "per_layer_projection"
    """Layer with which a block adds a function of the second input to the residual stream."""
    kv_sharing: Callable[[Any, nn.Module], KvSharing | None] | None = None
    """Hook that returns, for a config and one of its attentions, how that shares keys and values with others."""
    pre_norm: str | None = None
    """Config key that is false where norms act on the residual stream itself, so that no module can repair the error of
    the modules before it."""
    for_rows: Callable[[Mapping[str, Any], int], dict[str, Any]] | None = None
    """Hook that returns a block's keyword arguments for a number of rows, from those for one row; None where these
    broadcast."""
    heads_by_layer_type: bool = False
    """Whether blocks with a sliding window have heads of another size and number than blocks without."""
    experts: Experts | None = None
    """Mixture of experts in the feed-forward's place in some blocks, or in all."""
    stock: Stock = field(default_factory=Stock)
    """Format `stock`: spelling of widths in the config of the family's own class."""
    gguf: Gguf = field(default_factory=Gguf)
    """Format `gguf`: llama.cpp's architectures and the layout of its files."""
    vllm: Vllm = field(default_factory=Vllm)
    """Limits of vLLM."""

    @property
    def base(self) -> str:
        """Name of the model without its output layer; Llama 4's `base_model_prefix` is another model's."""
        return self.blocks.partition(".")[0]

    @property
    def mixture(self) -> str:
        """Path of the submodule that holds experts and router, with a dot; empty where the block itself does."""
        assert self.experts is not None
        return "" if self.experts.parallel_norms else f"{self.feed_forward}."

    def sharing(self, config: Any, attention: nn.Module) -> KvSharing | None:
        """Return how an attention shares keys and values with other blocks; None if it does not."""
        return None if self.kv_sharing is None else self.kv_sharing(config, attention)

    def keeps_residual(self, config: Any) -> bool:
        """Return whether modules add to a residual stream that no norm changes."""
        return self.pre_norm is None or bool(getattr(config, self.pre_norm))

    def lock(self, config: Any) -> str | None:
        """Return why heads cannot be removed exactly from the blocks of a config; None where they can."""
        return self.heads_locked if self.locked_by is None or getattr(config, self.locked_by, None) else None


@dataclass(frozen=True)
class Twin:
    """Decoder inside multimodal models that has no causal language model class of its own, and computes the same as a
    family if the input is text alone.

    Its rotary embeddings have separate positions for time, height and width; in text, all three are equal.
    """

    family: str
    """model_type of the family."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Config values of the family for which both compute the same."""
    derives_head_size: bool = False
    """Whether the decoder's class derives the head size, unlike the family's."""
    inputs_first: bool = False
    """Whether checkpoints may store matrices of experts with inputs first."""
    gguf: Gguf = field(default_factory=Gguf)
    """Facts about GGUF files of the decoder, as in `Family`."""
