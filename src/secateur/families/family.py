"""The description of a model: how its blocks are laid out.

Names of layers are relative to the block, except for `blocks` and `final_norm`. Sizes, biases and the orientation of
stored matrices are read from the block itself (on the meta device). If no field can describe what a family computes, a
field holds a function (a hook) from the file of the family's entry.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal, NamedTuple

from torch import nn

from secateur.families.entry import Entry

NOWHERE = "nowhere"
"""Path that no block has, for a module that a model does not have or that was not understood."""


def submodule(layer: Any, path: str | None) -> Any:
    """Return a submodule of a block; None if the block has none at this path."""
    return reduce(lambda part, name: getattr(part, name, None), filter(None, (path or "").split(".")), layer)


class Other(NamedTuple):
    """Submodule of a block that adds to the residual stream and is never pruned."""

    path: str
    outputs: int
    """Number of values that it returns."""
    why: str
    """Why it is never pruned."""


@dataclass(frozen=True)
class Experts:
    """Mixture of experts in the feed-forward's place, in all blocks or in some."""

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
    """Submodule that computes the gate of the shared expert; None if the shared expert has no gate."""
    shared_expert_width: str | None = None
    """Config key of the shared expert's width; None if its width is a multiple of the other experts' width."""
    groups: tuple[str, str] | None = None
    """Config keys of the number of groups of experts, and of the number of groups that a token may choose from. All
    groups keep the same number of experts."""
    parallel_norms: tuple[str, str] | None = None
    """Norms before and after the experts, if experts and router are children of the block itself, parallel to a
    feed-forward that is never pruned. The norm after the feed-forward is then applied to the sum of their outputs."""
    batched_router: bool = False
    """Whether the router takes rows of tokens (b x t x d) instead of tokens (n x d)."""
    scale: str | None = None
    """Config key of a factor on the sum of the routed experts' outputs; None without one."""
    returns_scores: bool = False
    """Whether the feed-forward returns a tuple: its output, then the router's scores."""
    scales_inputs: bool = False
    """Whether gates multiply the inputs of experts, not their outputs."""
    stored: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("gate_up_proj", ("gate_proj", "up_proj")),
        ("down_proj", ("down_proj",)),
    )
    """Tensors of the submodule `experts`, each with the names of the parts that checkpoints store for every expert."""
    stacked: bool = False
    """Whether checkpoints store the matrices of all experts of a block in one tensor, not expert by expert."""
    inputs_first: bool = False
    """Whether stacked matrices have inputs first (experts x inputs x outputs)."""
    alternating: bool = False
    """Whether the rows of gate and up projection alternate in stacked matrices; the experts then have biases."""


@dataclass(frozen=True)
class TokenMixer:
    """Token mixer in the attention's place in some blocks: linear attention, Mamba or a convolution. It is never
    pruned."""

    path: str
    """Submodule of the block."""
    output: str
    """Output layer inside that submodule."""
    outputs: int = 1
    """Number of values that the submodule returns, the output first."""
    marker: str | None = None
    """Name inside the submodule that an attention at the same path in other blocks lacks; None if there is none."""


class KvSharing(NamedTuple):
    """Sharing of keys and values between one attention and the attentions of other blocks."""

    layer_type: str
    """Layer type of the block. Only blocks of the same layer type share keys and values."""
    provides_keys: bool
    """True if later blocks use the keys and values of this attention; False if this attention uses an earlier
    block's."""
    entries: int
    """Number of entries of one token's keys, and also of its values."""
    head_dim: int
    """Entries per head."""


@dataclass(frozen=True)
class Family:
    """Description of the blocks of a model. The defaults describe Llama."""

    blocks: str = "model.layers"
    """List of blocks, by its name in the whole model."""
    attention: str = "self_attn"
    """Attention submodule."""
    queries: str = "q_proj"
    keys: str = "k_proj"
    values: str = "v_proj"
    """Layers of queries, keys and values inside the attention."""
    output: str = "o_proj"
    """Output projection of the attention."""
    fused: str | None = None
    """Fused layer of queries, keys and values; None for three layers."""
    interleaved: bool = False
    """Whether the fused layer holds the queries, key and value of one KV group after the other; otherwise it holds all
    queries, then all keys, then all values."""
    key_value_heads: Callable[[Any], int] | None = None
    """Hook that returns the number of key/value heads of a config, if the config has no num_key_value_heads."""
    ungrouped: bool = False
    """Whether every query head has its own key/value head, whatever the config says."""
    latent: tuple[str, str] | None = None
    """Layers of latent attention: the layer that computes the latent vector that all heads share, and the layer that
    computes keys and values from it. Queries may be computed from a latent vector too, by the layer
    `latent_queries`."""
    latent_queries: str = "q_b_proj"
    """Layer that computes queries from a latent vector; blocks without this layer have the layer `queries`."""
    sinks: str | None = None
    """Parameter of the attention with one entry for each query head."""
    feed_forward: str | None = "mlp"
    """Feed-forward submodule; None if its layers are children of the block itself."""
    up: str = "up_proj"
    gate: str | None = "gate_proj"
    """Input projections of the feed-forward. `gate` is None if there is no gate."""
    down: str = "down_proj"
    """Output projection of the feed-forward."""
    fused_gate: str | None = None
    """Fused layer with the rows of the gate, then the rows of the up layer; None for two layers."""
    activation: str | None = None
    """Activation of the feed-forward, if it is a submodule with parameters."""
    final_norm: str = "model.norm"
    """Norm between the last block and the output layer, by its name in the whole model."""
    norm_offset: bool = False
    """Whether norms store their gain minus one."""
    norm_after_attention: str | None = None
    norm_after_feed_forward: str | None = None
    """Norms between the output projection and the residual stream."""
    norm_before_attention: str | None = None
    norm_before_feed_forward: str | None = None
    """Norms between the residual stream and the input projections. They are named only in families whose modules also
    have a norm after them: the gains of the norms before later modules show how strongly these read a module's
    output."""
    heads_locked: str | None = None
    """Reason why single heads cannot be removed exactly, so that a block keeps all of its heads or none; None if they
    can."""
    attention_fixed: bool = False
    """Whether the whole attention cannot be removed either, if heads are locked."""
    adds_residual: bool = False
    """Whether the attention and the feed-forward add their outputs to the residual stream themselves."""
    returns_tuple: bool = False
    """Whether blocks return a tuple whose first entry is the residual stream."""
    head_gates: tuple[str, ...] = ()
    """Further layers of the attention with rows for each query head: gates on the outputs of heads."""
    changes_residual: bool = False
    """Whether blocks change the residual stream otherwise than by adding their modules' outputs to it."""
    others: tuple[Other, ...] = ()
    """Submodules that add to the residual stream and are never pruned."""
    attention_outputs: int = 2
    """Number of values that the attention returns, the output first."""
    token_mixer: TokenMixer | None = None
    """Token mixer in the attention's place in some blocks. Heads are removed from the other blocks, channels from
    all."""
    residual_multiplier: str | None = None
    """Config key of a factor between the output of a module and the residual stream."""
    block_multiplier: str | None = None
    """Buffer of the block: a factor on the whole residual stream after the block."""
    per_layer_input: str | None = None
    """Config key of the width of a second input of each block. The second input depends on the token alone, and a
    function of it is added to the residual stream after both modules."""
    per_layer_output: str = "per_layer_projection"
    """Layer whose output is this function of the second input."""
    kv_sharing: Callable[[Any, nn.Module], KvSharing | None] | None = None
    """Hook that returns, for a config and one attention of the model, how the attention shares keys and values."""
    repeated: tuple[str | int, ...] = ()
    """Arguments of a block that a batch needs once for each row, one after the other; others broadcast. Keyword
    arguments are named, positional ones have their place after the residual stream."""
    heads_by_layer_type: bool = False
    """Whether blocks with a sliding window have heads of another size and number than blocks without."""
    experts: Experts | None = None
    """Mixture of experts in the feed-forward's place in some blocks, or in all."""
    channels_key: str = "intermediate_size"
    """Config key of the feed-forward width."""
    derives_channels: bool = False
    """Whether the class derives the feed-forward width and reads no key for it; only the format `hf` can change it."""
    head_counts: Literal["any", "divisors", "dense"] = "any"
    """Numbers of heads that the class accepts: any number; divisors of hidden_size; or the dense number only, because
    the class computes the head size as hidden_size / heads."""
    entry: Entry = field(default_factory=Entry)
    """Facts that the class does not tell."""

    @property
    def base(self) -> str:
        """Name of the model without its output layer; Llama 4's `base_model_prefix` is another model's."""
        return self.blocks.partition(".")[0]

    @property
    def mixture(self) -> str:
        """Path of the submodule that holds experts and router, with a dot at the end; empty if the block itself holds
        them."""
        assert self.experts is not None
        return "" if self.experts.parallel_norms else f"{self.feed_forward}."

    def has(self, layer: nn.Module, path: str | None, *names: str | None) -> bool:
        """Return whether a block has a module at a path, with one of the named layers; None stands for the block
        itself."""
        part = submodule(layer, path)
        return part is not None and any(submodule(part, name) is not None for name in names if name)

    def norm_after(self, layer: nn.Module, role: str) -> str | None:
        """Return the norm of a block between the output projection of a module, "attention" or "feed_forward", and the
        residual stream; None if there is none."""
        name: str | None = getattr(self, f"norm_after_{role}")
        return name if submodule(layer, name or NOWHERE) is not None else None

    def sharing(self, config: Any, attention: nn.Module) -> KvSharing | None:
        """Return how an attention shares keys and values with other blocks; None if it does not."""
        return None if self.kv_sharing is None else self.kv_sharing(config, attention)
