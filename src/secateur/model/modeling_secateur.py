"""Stock transformers models whose layers differ in width. This file comes with the weights and needs nothing else.

config.json is that of the dense model, and `per_layer_config` (inside `text_config`, where there is one) says where a
layer differs: in query heads (`num_attention_heads`), key/value heads (`num_key_value_heads`), feed-forward channels
(`intermediate_size`, `intermediate_size_mlp`, `n_inner`, `ffn_dim` or `ffn_hidden_size`) or experts (`num_experts`,
`num_local_experts`, `n_routed_experts` or `moe_num_experts`), and in biases that only its output layers have. The stock
class builds the dense layers, then each is cut down to its width; on the meta device, where `from_pretrained` builds,
this is free.
A layer without heads or channels adds nothing but the bias of its output layer.

`SecateurLlamaForCausalLM` is transformers' `LlamaForCausalLM` built this way, and so on for every such name.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "Secateur"
"""Of class names: what follows is the name of a class in transformers."""

IMAGES = "AutoModelForImageTextToText"
"""What opens models that see images too."""

AUTO = {
    "ForConditionalGeneration": IMAGES,
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "LMHeadModel": "AutoModelForCausalLM",
    "Model": "AutoModel",
}
"""How names of classes end, and what opens such; the others are causal language models."""

WIDTHS = "layer_widths"
"""What stands for `per_layer_config` where the stock model has one, in which layers of a type are alike (Gemma 4)."""

ATTENTION_BIAS, FEED_FORWARD_BIAS = "attention_output_bias", "feed_forward_output_bias"
"""Keys of `per_layer_config`: the output layer has a bias, although the stock class gives it none."""

CHANNELS = ("ffn_dim", "ffn_hidden_size", "n_inner", "intermediate_size_mlp", "intermediate_size")
"""Keys of the feed-forward width; a config has one of them."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of the number of experts, in configs and in the modules that experts and routers are."""

INNER = ("moe_intermediate_size", "intermediate_size")
"""Keys of how many channels each expert has."""

CHOSEN = ("top_k", "num_experts_per_tok")
"""What routers call the number of experts that a token meets."""

ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
"""What layers call their attention."""

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2", "fc_out", "w2", "dense_4h_to_h")
"""The layers whose inputs are heads or channels; of the others these are the outputs."""

SHARED = ("q_a_proj", "kv_a_proj_with_mqa")
"""Layers of an attention that make what all its heads share."""


SHARED_EXPERTS = ("shared_experts", "shared_expert", "shared_mlp")
"""What mixtures call the expert that all tokens meet."""


class PerLayer(nn.Module):
    """Goes before a stock model class: its layers get the widths that the config gives each of them."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        # Of a model that sees images too, the decoder inside is pruned.
        config = getattr(config, "text_config", config)
        inside = ("language_model", "text_model")
        decoder = next((part for name, part in self.named_modules() if name.endswith(inside)), self)
        # Every stock decoder keeps its layers in one list.
        lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
        layers = next(found for found in lists if len(found) == config.num_hidden_layers)
        for index, layer in enumerate(layers):
            own = overrides(config, index)
            if own:
                heads = own.get("num_attention_heads", config.num_attention_heads)
                groups = own.get("num_key_value_heads", getattr(config, "num_key_value_heads", None) or heads)
                channels = next((own.get(key, getattr(config, key)) for key in CHANNELS if hasattr(config, key)), 0)
                # Some configs know the number by more than one of the names.
                counts = (*(own[key] for key in EXPERTS if key in own), *(getattr(config, key, 0) for key in EXPERTS))
                experts = next(filter(None, counts), 0)
                inner = next((own[key] for key in INNER if key in own), 0)
                biases = (own.get(ATTENTION_BIAS, False), own.get(FEED_FORWARD_BIAS, False))
                resize(layer, heads, groups, channels, biases, experts, inner)
        attentions = [getattr(layer, name) for layer in layers for name in ATTENTIONS if hasattr(layer, name)]
        gone = [isinstance(attention, NoHeads) for attention in attentions]
        if any(gone):
            owner = next(module for module in decoder.modules() if layers in module.children())
            owner.register_forward_hook(partial(note_no_heads, gone))


def __getattr__(name: str) -> type[nn.Module]:
    """Make a class when it is first asked for."""
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if stock is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    # `_auto_class` makes save_pretrained copy this file.
    auto = next((auto for end, auto in AUTO.items() if name.endswith(end)), "AutoModelForCausalLM")
    globals()[name] = type(name, (PerLayer, stock), {"__module__": __name__, "_auto_class": auto})
    share_renames(stock.__name__, name, auto)
    return globals()[name]


def share_renames(stock: str, ours: str, auto: str) -> None:
    """Let a class read and write tensors under the names that its stock class gives them in checkpoints.

    transformers 5 keeps them by class name (GPT-NeoX's `embed_out` is its `lm_head`), and not for other people's. The
    others are kept by the kind of model (Mixtral's experts): they reach the stock model inside, where there is one.
    """
    try:
        from transformers import conversion_mapping as renames
    except ImportError:  # transformers 4 renames nothing
        return
    found = renames.get_checkpoint_conversion_mapping(stock)
    if found is None and auto in (IMAGES, "AutoModel"):
        found = renames.get_checkpoint_conversion_mapping(getattr(transformers, stock).config_class.model_type)
    if found:
        renames.register_checkpoint_conversion_mapping(ours, found, overwrite=True)


def note_no_heads(gone: list[bool], decoder: nn.Module, args: Any, output: Any) -> None:
    """Put weights of no heads among the attention weights that are handed on, where a layer has none to give.

    Args:
        gone: of each attention, whether its heads are gone.
    """
    seen = getattr(output, "attentions", None)
    if seen and len(seen) == gone.count(False):
        rest = iter(seen)
        output.attentions = tuple(seen[0][:, :0] if none else next(rest) for none in gone)


def overrides(config: Any, index: int) -> dict[str, Any]:
    """In what one layer differs from the rest of the config."""
    # transformers 5.15 and newer parse `per_layer_config`; older ones keep the JSON, whose keys are strings.
    spec = vars(config).get("_heterogeneity_spec")
    stored = vars(config).get("per_layer_config", {}) if spec is None else spec.per_layer_overrides
    stored = vars(config).get(WIDTHS, stored)
    return next((own for key, own in stored.items() if int(key) == index), {})


def resize(
    layer: nn.Module,
    heads: int,
    groups: int,
    channels: int,
    biases: tuple[bool, bool] = (False, False),
    experts: int = 0,
    inner: int = 0,
) -> None:
    """Cut one stock decoder layer down, in place.

    Args:
        layer: with the dense widths; values that stay are the first ones, so weights are loaded afterwards.
        heads: query heads; 0 takes the attention away.
        groups: key/value heads.
        channels: feed-forward width; 0 takes the feed-forward away.
        biases: whether the attention's and the feed-forward's output layers get a bias that they do not have yet.
        experts: how many there are, where the feed-forward is a mixture of them.
        inner: channels of each of these; 0 leaves them as they are.
    """
    name = next((name for name in ATTENTIONS if hasattr(layer, name)), "")
    attention: Any = getattr(layer, name, None)
    every = attention.config.num_attention_heads if hasattr(attention, "config") else heads
    if attention is None:
        pass  # Another kind of layer, which keeps its width.
    elif heads and heads == every:
        for child, linear in projections(attention):
            if child in OUTPUTS:
                narrow(linear, True, width_of(linear, True), biases[0])
    elif heads:
        # Falcon's config does not say it for all of its kinds.
        pairs = getattr(attention, "num_kv_heads", None) or getattr(attention.config, "num_key_value_heads", every)
        pairs = pairs or every
        shares = {"k_proj": (groups, pairs), "v_proj": (groups, pairs)}
        shares |= dict.fromkeys(("qkv_proj", "query_key_value"), (heads + 2 * groups, every + 2 * pairs))
        for child, linear in projections(attention):
            if child in SHARED:
                continue
            output = child in OUTPUTS
            kept, dense = shares.get(child, (heads, every))
            narrow(linear, output, width_of(linear, output) // dense * kept, biases[0])
        if hasattr(attention, "sinks"):
            attention.sinks = nn.Parameter(attention.sinks.detach()[:heads].clone())
        counts = {"num_attention_heads": heads, "num_key_value_heads": groups}
        counts |= {"num_heads": heads, "num_kv_heads": groups, "num_key_value_groups": heads // groups}
        if hasattr(attention, "split_size"):
            counts["split_size"] = attention.split_size // every * heads
        for key, count in counts.items():
            if hasattr(attention, key):
                setattr(attention, key, count)
        attention.config = LayerConfig(attention.config, counts)
    else:
        setattr(layer, name, NoHeads(attention, biases[0]))
    # OPT's two feed-forward layers hang in the decoder layer itself.
    place = next((name for name in ("mlp", "feed_forward", "ffn", "block_sparse_moe") if hasattr(layer, name)), "")
    mlp: Any = getattr(layer, place, layer)
    if hasattr(layer, "experts"):
        # Beside a feed-forward, which stays.
        narrow_mixture(layer, experts, inner)
    elif hasattr(mlp, "experts") or hasattr(mlp, "input_linear"):
        narrow_mixture(mlp, experts, inner)
    elif channels:
        for child, linear in projections(mlp):
            narrow(linear, child in OUTPUTS, channels * (2 if child == "gate_up_proj" else 1), biases[1])
    elif mlp is layer:
        layer.fc1, layer.fc2 = nn.Identity(), Constant(layer.fc2, biases[1])
    else:
        setattr(layer, place, NoChannels(mlp, biases[1]))


def narrow_mixture(mixture: Any, experts: int, inner: int) -> None:
    """Keep the first experts of a mixture, and the first channels of each where their number is given."""
    held: Any = getattr(mixture, "experts", None)
    names = ["gate", "router", "moe_statics", "input_linear", "output_linear"]
    if isinstance(held, nn.ModuleList):  # transformers 4
        dense = len(held)
        mixture.experts = nn.ModuleList(list(held)[:experts])
    else:
        # GraniteMoe has two layers of experts there.
        first = mixture.input_linear if held is None else held
        dense = next(getattr(first, key) for key in EXPERTS if hasattr(first, key))
        names.append("experts")
    parts = [getattr(mixture, name) for name in names if hasattr(mixture, name)]
    for owner in (mixture, *(module for part in parts for module in part.modules())):
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and dense in tensor.shape:
                    less = tensor.detach().narrow(tensor.shape.index(dense), 0, experts).clone()
                    tensors[name] = nn.Parameter(less) if isinstance(tensor, nn.Parameter) else less
        for key, value in vars(owner).items():
            if key in (*EXPERTS, "out_features") and value == dense:
                setattr(owner, key, experts)
            elif key in CHOSEN:
                setattr(owner, key, min(value, experts))
    if not inner:
        return
    if isinstance(held, nn.ModuleList):
        parts = [projections(expert) for expert in mixture.experts]
        full = next(width_of(linear, True) for child, linear in parts[0] if child in OUTPUTS)
        for child, linear in (pair for part in parts for pair in part):
            narrow(linear, child in OUTPUTS, inner * (2 if child == "gate_up_proj" else 1), False)
    else:
        both = (mixture.input_linear, mixture.output_linear) if held is None else (held, held)
        full = narrow_experts(*both, inner)
    # Qwen's has a width of its own, and a gate.
    shared = [] if hasattr(mixture, "shared_expert_gate") else [getattr(mixture, name, None) for name in SHARED_EXPERTS]
    for child, linear in (pair for part in shared if part is not None for pair in projections(part)):
        output = child in OUTPUTS
        narrow(linear, output, width_of(linear, output) // full * inner, False)


def narrow_experts(first: Any, second: Any, inner: int) -> int:
    """Keep the first channels of matrices that hold all experts; gives how many there were."""
    up, down = (name if hasattr(first, name) else "weight" for name in ("gate_up_proj", "down_proj"))
    # Inputs come first in some, and there are twice as many rows of gate and up together as inputs of down.
    turned = getattr(first, up).shape[2] == 2 * getattr(second, down).shape[1]
    full = int(getattr(second, down).shape[2 - turned])
    places = [
        (first, up, 1 + turned, 2 * inner),
        (first, f"{up}_bias", 1, 2 * inner),
        (second, down, 2 - turned, inner),
    ]
    for owner, name, axis, size in places:
        if getattr(owner, name, None) is not None:
            setattr(owner, name, nn.Parameter(getattr(owner, name).detach().narrow(axis, 0, size).clone()))
    return full


def projections(module: nn.Module) -> list[tuple[str, Any]]:
    """The weight matrices that hang in a module itself: Linear, or GPT-2's Conv1D."""
    return [(name, child) for name, child in module.named_children() if hasattr(child, "nf") or is_linear(child)]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a Linear."""
    return isinstance(module, nn.Linear)


def inner_axis(linear: Any, output: bool) -> int:
    """The axis of a weight that runs over heads or channels: an output layer's inputs, another one's outputs."""
    # Linear stores outputs first, Conv1D inputs first.
    return int(output) if is_linear(linear) else int(not output)


def width_of(linear: Any, output: bool) -> int:
    """How long that axis is."""
    return int(linear.weight.shape[inner_axis(linear, output)])


def narrow(linear: Any, output: bool, size: int, biased: bool) -> None:
    """Keep the first `size` inputs of an output layer, or the first `size` outputs of another one."""
    axis = inner_axis(linear, output)
    linear.weight = nn.Parameter(linear.weight.detach().narrow(axis, 0, size).clone())
    if linear.bias is not None and not output:
        linear.bias = nn.Parameter(linear.bias.detach()[:size].clone())
    elif linear.bias is None and output and biased:
        linear.bias = nn.Parameter(linear.weight.new_zeros(linear.weight.shape[1 - axis]))
    if is_linear(linear):
        linear.out_features, linear.in_features = linear.weight.shape
    else:
        linear.nx, linear.nf = linear.weight.shape


class LayerConfig:
    """The model's config as one attention sees it: its own head counts, all else live.

    A copy would miss it when the attention implementation of the model is changed.
    """

    def __init__(self, config: Any, counts: dict[str, int]):
        self.__dict__.update(counts, whole=config)

    def __getattr__(self, name: str) -> Any:
        if "whole" not in self.__dict__:  # while it is being copied
            raise AttributeError(name)
        return getattr(self.whole, name)


class Constant(nn.Module):
    """What is left of an output layer without inputs: its bias, or zeros."""

    def __init__(self, linear: Any, biased: bool):
        super().__init__()
        width = linear.weight.shape[0] if is_linear(linear) else linear.weight.shape[1]
        has_bias = biased or linear.bias is not None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(linear.weight.new_zeros(width)) if has_bias else None)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The same for every token; the argument has the shape of the result."""
        zeros = torch.zeros_like(hidden_states)
        return zeros if self.bias is None else zeros + self.bias


class NoChannels(nn.Module):
    """A feed-forward without channels."""

    def __init__(self, mlp: nn.Module, biased: bool):
        super().__init__()
        self.output = next(name for name, _ in projections(mlp) if name in OUTPUTS)
        left = Constant(getattr(mlp, self.output), biased)
        if left.bias is not None:
            # The stock name, so that the bias is stored under it. Without one nothing has that name: peft takes what
            # has it for a layer to adapt.
            self.add_module(self.output, left)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The bias of the output layer; some models let the feed-forward add the residual stream."""
        left = getattr(self, self.output, None)
        bias = torch.zeros_like(hidden_states) if left is None else left(hidden_states)
        return bias if residual is None else bias + residual


class NoHeads(NoChannels):
    """An attention without heads."""

    config: Any

    def __init__(self, attention: Any, biased: bool):
        super().__init__(attention, biased)
        # Decoder layers read some from outside, such as `is_sliding`.
        plain = {key: value for key, value in vars(attention).items() if not key.startswith("_")}
        self.__dict__.update(plain, output=self.output, heads=0)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """The bias of the output layer, and no attention weights."""
        # Transformers reads the length of the text from any layer's cache: this one notes one number a token, or as
        # many as are quantised together.
        for cache in (*args, *kwargs.values()):
            if isinstance(cache, Cache):
                size = next((layer.q_group_size for layer in cache.layers if hasattr(layer, "q_group_size")), 1)
                note = hidden_states.new_zeros(*hidden_states.shape[:2], size).unsqueeze(1)
                cache.update(note, note, self.layer_idx, {"cache_position": kwargs.get("cache_position")})
        if self.heads:  # Never: vLLM refuses a model with a layer in whose source it does not find this call.
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
            attend(self, hidden_states, hidden_states, hidden_states, None)
        return super().forward(hidden_states), None
