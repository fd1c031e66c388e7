"""Stock transformers models whose layers differ in size. This file ships with the weights and needs nothing else.

`SecateurLlamaForCausalLM` is transformers' `LlamaForCausalLM` with narrower layers, and so on for every class. The
stock class builds dense layers from config.json, then this file cuts each layer down; `from_pretrained` builds on the
meta device, where that costs nothing. This file knows no model family. config.json (its `text_config`, if any) says:

- `per_layer_config` (or `layer_widths`, which see): by layer, the config keys that have another value there, as in
  `{"3": {"num_attention_heads": 5, "intermediate_size": 800}}`. transformers 5 and vLLM read the same key.
- `layer_sizes`: what follows from those keys in a layer.
  - `shapes`: parameter or buffer → for each axis null (it stays) or the keys that its length is made of, each with a
    factor: `"self_attn.q_proj.weight": [{"num_attention_heads": 64}, null]`. A bias that only some output layers have
    is a multiple of a key that is true or false. `experts.*.w1.weight` is the same parameter of all modules in a list,
    and its first axis is the length of the list.
  - `attributes`: attribute of any module → its value, as keys with factors.
  - `attentions`, `feed_forwards`: output layer → the key that is zero where nothing but the layer's bias is left.
    `bare_attentions`, in some folders: the same for attentions that return no tuple.
  - `negative`, in some folders: the config key whose number is negative, so that the stock class fails.

What must keep working:

- transformers 4.57 and 5, with and without trust_remote_code. Versions give parameters other names (4.57 has a linear
  layer for each expert), so `shapes` has the names of all versions, and a name that a layer lacks is skipped. Should
  no name match, the stored tensor has another shape than the parameter, and loading fails.
- AutoModel, causal language models, heads for classification, and decoders inside models that see images.
- `save_pretrained`, deepcopy, `torch.compile`, every kind of cache, gradient checkpointing, peft (which adapts every
  module whose name matches, so that a missing layer must not leave one), and a change of the attention implementation.
- vLLM's transformers backend, which reads head counts per layer and the source of attention classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "Secateur"
"""Prefix of class names; the rest is the name of a class in transformers."""

IMAGES = "AutoModelForImageTextToText"
"""Auto class of models that see images."""

AUTO = {
    "ForConditionalGeneration": IMAGES,
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "LMHeadModel": "AutoModelForCausalLM",
    "Model": "AutoModel",
}
"""Auto class by the end of a class name; all others are causal language models."""

WIDTHS = "layer_widths"
"""Config key used instead of `per_layer_config` by stock classes that read that key themselves and refuse its
contents."""

SIZES = "layer_sizes"
"""Config key of the data by which layers are cut."""


class PerLayer(nn.Module):
    """Mixin in front of a stock model class: cuts each layer down to the sizes that the config gives it."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        with positive(config):
            super().__init__(config, *args, **kwargs)
        if any(type(part).__name__.startswith(PREFIX) for part in self.modules() if part is not self):
            return  # After `secateur.register`, AutoModel makes a decoder that is cut already.
        # In a model that sees images the decoder is pruned.
        config = getattr(config, "text_config", config)
        inside = ("language_model", "text_model")
        decoder = next((part for name, part in self.named_modules() if name.endswith(inside)), self)
        # Every stock decoder keeps its layers in one list.
        lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
        layers = next(found for found in lists if len(found) == config.num_hidden_layers)
        for index, layer in enumerate(layers):
            if own := overrides(config, index):
                resize(layer, getattr(config, SIZES), own, config)
                for part in (part for part in layer.modules() if isinstance(part, NoHeads)):
                    part.layer_idx = index
        sizes, named = getattr(config, SIZES), [dict(layer.named_modules()) for layer in layers]
        outputs = {**sizes["attentions"], **sizes.get("bare_attentions", {})}
        parts = [(one.get(output.rpartition(".")[0]), output in one) for one in named for output in outputs]
        gone = [isinstance(part, NoHeads) for part, has_output in parts if has_output or isinstance(part, NoHeads)]
        if any(gone):
            owner = next(module for module in decoder.modules() if layers in module.children())
            owner.register_forward_hook(partial(note_no_heads, gone))

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False, so that transformers computes buffers that no checkpoint holds, as for the stock class."""
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """Fill a layer that the checkpoint lacks, such as a new head, with random weights."""
        with positive(self.config):
            super()._init_weights(module)  # type: ignore[misc]


@contextmanager
def positive(config: Any) -> Iterator[None]:
    """Make the number of the config positive that is negative so that the stock class fails, inside the context."""
    config = getattr(config, "text_config", config)
    key = getattr(config, SIZES, {}).get("negative")
    if key is None:
        yield
        return
    number = getattr(config, key)
    setattr(config, key, abs(number))
    try:
        yield
    finally:
        setattr(config, key, number)


def __getattr__(name: str) -> type[nn.Module]:
    """Make a class when it is first asked for."""
    own = name.removeprefix(PREFIX)
    # A model's own classes are imported at the end of the file that ships with it.
    stock = (globals().get(own) or getattr(transformers, own, None)) if name.startswith(PREFIX) else None
    if stock is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    globals()[name] = per_layer(stock)
    return globals()[name]


def per_layer(stock: type[Any]) -> type[nn.Module]:
    """Return the class that makes narrower layers than a stock class does."""
    name = PREFIX + stock.__name__
    # `_auto_class` makes save_pretrained copy this file.
    auto = next((auto for end, auto in AUTO.items() if name.endswith(end)), "AutoModelForCausalLM")
    share_renames(stock, name, auto)
    return type(name, (PerLayer, stock), {"__module__": __name__, "_auto_class": auto})


def share_renames(stock: type[Any], ours: str, auto: str) -> None:
    """Let a class read and write tensors under the names that its stock class gives them in checkpoints.

    transformers 5 keeps some renames by class name (GPT-NeoX's `embed_out` is its `lm_head`), and those do not reach
    our class. It keeps others by model type (Mixtral's experts), and those reach our class only if it is a causal
    language model.
    """
    try:
        from transformers import conversion_mapping as renames
    except ImportError:  # transformers 4 renames nothing
        return
    found = renames.get_checkpoint_conversion_mapping(stock.__name__)
    if found is None and auto in (IMAGES, "AutoModel"):
        found = renames.get_checkpoint_conversion_mapping(stock.config_class.model_type)
    if found:
        renames.register_checkpoint_conversion_mapping(ours, found, overwrite=True)


def note_no_heads(gone: list[bool], decoder: nn.Module, args: Any, output: Any) -> None:
    """Add weights of no heads to the attention weights in the output, for layers without heads.

    Args:
        gone: for each attention, whether it has no heads.
    """
    seen = getattr(output, "attentions", None)
    if seen and len(seen) == gone.count(False):
        rest = iter(seen)
        output.attentions = tuple(seen[0][:, :0] if none else next(rest) for none in gone)


def overrides(config: Any, index: int) -> dict[str, Any]:
    """Return the config keys that have another value in one layer, with those values."""
    # transformers 5.15 and newer parse `per_layer_config`; older ones keep the JSON, whose keys are strings.
    spec = vars(config).get("_heterogeneity_spec")
    stored = vars(config).get("per_layer_config", {}) if spec is None else spec.per_layer_overrides
    stored = vars(config).get(WIDTHS, stored)
    return next((own for key, own in stored.items() if int(key) == index), {})


def resize(layer: nn.Module, sizes: dict[str, Any], own: dict[str, Any], config: Any) -> None:
    """Cut one stock decoder layer down, in place. The first entries of tensors stay.

    Args:
        layer: with the dense sizes.
        sizes: the config's `layer_sizes`.
        own: the config keys that have another value in this layer.
        config: holds the other keys' values.
    """

    def number(parts: dict[str, int] | None) -> int | None:
        if not parts or own.keys().isdisjoint(parts):
            return None
        return sum((own[key] if key in own else getattr(config, key)) * factor for key, factor in parts.items())

    for name, axes in sizes["shapes"].items():
        cut(layer, name, [number(axis) for axis in axes])
    bare = sizes.get("bare_attentions", {})
    for stand_in, outputs in (
        (NoHeads, sizes["attentions"]),
        (NoHeadsAlone, bare),
        (NoChannels, sizes["feed_forwards"]),
    ):
        for output in (output for output, key in outputs.items() if own.get(key) == 0):
            replace(layer, output, stand_in)
    # Other modules, such as a token mixer beside an attention, may have attributes of the same names.
    narrower = {name.partition(".")[0] for name in sizes["shapes"]} | {""}
    module: Any
    for path, module in layer.named_modules():
        for name, parts in sizes["attributes"].items() if path.partition(".")[0] in narrower else ():
            if name in vars(module) and (value := number(parts)) is not None:
                setattr(module, name, value)
        if "config" in vars(module):
            module.config = LayerConfig(module.config, own)


def cut(module: nn.Module, name: str, shape: list[int | None]) -> None:
    """Keep the first entries of a tensor along every axis that has a new length, and make a bias that is missing."""
    if shape.count(None) == len(shape):
        return
    path, several, rest = name.partition(".*.")
    if not several:
        path, _, leaf = name.rpartition(".")
    try:
        owner: Any = module.get_submodule(path)
    except AttributeError:  # another version's name
        return
    if several:
        if isinstance(owner, nn.ModuleList):
            del owner[len(owner) if shape[0] is None else shape[0] :]
            for one in owner:
                cut(one, rest, shape[1:])
        return
    if leaf in owner._parameters:
        whole = owner._parameters[leaf]
        whole = owner.weight.new_zeros(shape) if whole is None else whole
        owner._parameters[leaf] = nn.Parameter(first_entries(whole, shape))
    elif leaf in owner._buffers:
        owner._buffers[leaf] = first_entries(owner._buffers[leaf], shape)
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape
    elif hasattr(owner, "nf"):  # GPT-2's Conv1D
        owner.nx, owner.nf = owner.weight.shape


def first_entries(tensor: torch.Tensor, shape: list[int | None]) -> torch.Tensor:
    """Return a copy of the first entries along every axis that has a new length."""
    for axis, length in enumerate(shape):
        tensor = tensor.detach().narrow(axis, 0, tensor.shape[axis] if length is None else length)
    return tensor.clone()


def replace(layer: Any, output: str, stand_in: type[NoChannels]) -> None:
    """Put a stand-in in the place of the module that ends in an output layer."""
    path, _, name = output.rpartition(".")
    if path:
        home, _, place = path.rpartition(".")
        setattr(layer.get_submodule(home), place, stand_in(layer.get_submodule(path), name))
        return
    # The layers of a feed-forward may be in the decoder layer itself (OPT).
    for place, linear in list(layer.named_children()):
        if getattr(linear, "out_features", None) == 0:
            setattr(layer, place, nn.Identity())
    setattr(layer, name, Constant(getattr(layer, name).bias))


class LayerConfig:
    """The model's config as the modules of one layer see it: with the layer's own values, and all else live.

    A copy would not notice when the attention implementation of the model is changed.
    """

    def __init__(self, config: Any, own: dict[str, Any]):
        self.__dict__.update(own, whole=config)

    def __getattr__(self, name: str) -> Any:
        if "whole" not in self.__dict__:  # while it is being copied
            raise AttributeError(name)
        return getattr(self.whole, name)


class Constant(nn.Module):
    """An output layer without inputs: its bias, or zeros."""

    def __init__(self, bias: nn.Parameter | None):
        super().__init__()
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the same for every token; the argument has the shape of the result."""
        zeros = torch.zeros_like(hidden_states)
        return zeros if self.bias is None else zeros + self.bias


class NoChannels(nn.Module):
    """A feed-forward without channels."""

    def __init__(self, mlp: nn.Module, output: str):
        super().__init__()
        self.output, bias = output, getattr(mlp, output).bias
        if bias is not None:
            # The stock name, so that the bias is stored under it. Without a bias nothing has that name: peft would
            # take it for a layer to adapt.
            self.add_module(output, Constant(bias))

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return the bias of the output layer; some models let the feed-forward add the residual stream."""
        left = getattr(self, self.output, None)
        bias = torch.zeros_like(hidden_states) if left is None else left(hidden_states)
        return bias if residual is None else bias + residual


class NoHeads(NoChannels):
    """An attention without heads."""

    config: Any
    layer_idx: int

    def __init__(self, attention: Any, output: str):
        super().__init__(attention, output)
        # Decoder layers read some attributes from outside, such as `is_sliding`.
        plain = {key: value for key, value in vars(attention).items() if not key.startswith("_")}
        self.__dict__.update(plain, output=output, heads=0)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """Return the bias of the output layer, and no attention weights."""
        # transformers reads the length of the text from any layer's cache: this one gets one number a token, or as
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


class NoHeadsAlone(NoHeads):
    """An attention without heads that returns no tuple."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """Return the bias of the output layer."""
        return super().forward(*args, **kwargs)[0]
