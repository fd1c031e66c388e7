"""A block laid out as its two depth-2 modules, by its family's entry.

Sizes, biases and the orientation of stored matrices are read off the block itself, on the meta device.
"""

import re
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.base.errors import SecateurError
from secateur.base.words import twice
from secateur.families.entry import Experts, Family
from secateur.families.registry import family_of
from secateur.model.facts import head_dim, key_value_heads
from secateur.model.structure import (
    CHANNELS,
    EXPERT_CHANNELS,
    EXPERTS,
    HEADS,
    HEADS_PER_GROUP,
    KV_GROUPS,
    Axis,
    Block,
    Depth2,
    Slab,
)

EXPERTS_MULTIPLE = 8
"""Divisor of the channels of experts: their kernels take rows of 16 bytes, in half precision."""
MIXED = "another kind of layer stands in the attention's place"


def describe(config: Any, layer: nn.Module) -> Block:
    """Lay a block out as its two depth-2 modules.

    Args:
        config: the model's config.
        layer: one of its blocks, on any device; only names, types and shapes are read.
    """
    family = family_of(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    feed_forward = _mixture(config, family, layer) if _mixed(family, layer) else _feed_forward(family, layer)
    block = Block(_attention(config, family, layer), feed_forward, shapes)
    names = list[str]()
    for module in block.modules:
        # Layers that are fused have slabs of their own, and what experts end in narrows on two sides.
        level1 = dict.fromkeys(slab.name for slab in module.level1)
        names += {*level1, module.level2.name} if module.inner else [*level1, module.level2.name]
        names += [slab.name for slab in module.level1 if module.level1.count(slab) > 1]
    if wrong := next((name for name in names if name not in shapes), None) or twice(names):
        what = "stands for two layers" if wrong in shapes else "is no tensor of a block"
        raise SecateurError(f"{config.model_type}: by its entry {wrong} {what}; correct the entry")
    return block


def _mixed(family: Family, layer: nn.Module) -> bool:
    """Whether the block has experts."""
    if family.experts is None:
        return False
    return hasattr(layer.get_submodule(family.mixture.rstrip(".")), family.experts.router)


def _level1(
    layer: nn.Module,
    path: str,
    along: tuple[str, ...],
    units: int,
    size: int,
    offset: int = 0,
    run: int = 1,
    gap: int = 0,
) -> tuple[Slab, ...]:
    """Weight and, if there is one, bias of a level-1 layer."""
    linear = layer.get_submodule(path)
    # Conv1D stores its weight input first, Linear output first.
    slabs = [Slab(f"{path}.weight", int(isinstance(linear, Conv1D)), along, units, size, offset, run, gap)]
    if getattr(linear, "bias", None) is not None:
        slabs.append(Slab(f"{path}.bias", 0, along, units, size, offset, run, gap))
    return tuple(slabs)


def _level2(layer: nn.Module, path: str, along: tuple[str, ...], units: int, size: int) -> tuple[Slab, str | None]:
    """Weight and, if there is one, the name of the bias of the level-2 layer."""
    linear = layer.get_submodule(path)
    slab = Slab(f"{path}.weight", int(not isinstance(linear, Conv1D)), along, units, size)
    return slab, slab.bias if getattr(linear, "bias", None) is not None else None


def _heads_output(layer: nn.Module, path: str, heads: int) -> tuple[Slab, str | None]:
    """Level 2 of an attention whose heads have the size that its inputs give them."""
    linear: Any = layer.get_submodule(path)
    return _level2(layer, path, HEADS, heads, linear.weight.shape[1] // heads)


def head_axes(groups: int, heads: int, locked: bool = False) -> tuple[Axis, Axis]:
    """Return the nested axes of query heads: KV groups, and heads in each of them."""
    return (
        Axis(KV_GROUPS, groups, locked=locked),
        Axis(HEADS_PER_GROUP, heads // groups, locked=locked),
    )


def _attention(config: Any, family: Family, layer: nn.Module) -> Depth2:
    heads = config.num_attention_heads
    groups = key_value_heads(config)
    if family.token_mixer is not None and hasattr(layer, family.token_mixer.path):
        path, output = family.token_mixer.path, family.token_mixer.output
        inner: Any = layer.get_submodule(f"{path}.{output}")
        if inner.weight.shape[1] % heads:
            raise SecateurError(
                f"{config.model_type}: {heads} heads do not divide the {inner.weight.shape[1]} inputs of "
                f"{path}.{output}, and no such model is known"
            )
        level2, bias = _heads_output(layer, f"{path}.{output}", heads)
        return Depth2(
            "heads",
            head_axes(groups, heads, True),
            (),
            level2,
            bias,
            path,
            None,
            None,
            groups,
            MIXED,
            fixed=True,
            mixes=True,
        )
    dim, path, after = head_dim(config), family.attention, family.norm_after_attention
    if family.latent is not None:
        return _latent(family, layer, heads)
    if (why := family.lock(config)) is not None:
        level2, bias = _heads_output(layer, f"{path}.{family.output}", heads)
        own: Any = layer.get_submodule(path)
        # Keys and values that later blocks attend with are made of nothing but this block's input.
        sharing = family.sharing(config, own)
        fixed = family.attention_fixed or (sharing is not None and sharing.lends)
        joins = None if family.adds_residual else path
        axes = head_axes(groups, heads, True)
        return Depth2("heads", axes, (), level2, bias, joins, after, None, groups, why, fixed=fixed, pair=True)
    if family.fused is None:
        # Queries may carry a gate of the head's output with them.
        queries: Any = layer.get_submodule(f"{path}.{family.queries}")
        rows = int(queries.weight.shape[int(isinstance(queries, Conv1D))]) // heads
        level1 = _level1(layer, f"{path}.{family.queries}", HEADS, heads, rows)
        for name in (family.keys, family.values):
            level1 += _level1(layer, f"{path}.{name}", (KV_GROUPS,), groups, dim)
        if family.sinks is not None:
            level1 += (Slab(f"{path}.{family.sinks}", 0, HEADS, heads, 1),)
    elif family.interleaved:
        each = heads // groups * dim
        level1 = _level1(layer, f"{path}.{family.fused}", HEADS, heads, dim, 0, heads // groups, 2 * dim)
        for start in (each, each + dim):
            level1 += _level1(layer, f"{path}.{family.fused}", (KV_GROUPS,), groups, dim, start, 1, each + dim)
    else:
        level1 = _level1(layer, f"{path}.{family.fused}", HEADS, heads, dim)
        for start in (heads * dim, (heads + groups) * dim):
            level1 += _level1(layer, f"{path}.{family.fused}", (KV_GROUPS,), groups, dim, start)
    level2, bias = _level2(layer, f"{path}.{family.output}", HEADS, heads, dim)
    inside = {*(slab.name for slab in level1), level2.name, bias}
    others = {name: value for name, value in layer.get_submodule(path).named_parameters(path) if name not in inside}
    # One vector for all heads, or one for each of them.
    apart = any(value.numel() not in (1, dim) or re.search(r"\.\d+\.", name) for name, value in others.items())
    locked = "its query and key norms differ from head to head" if apart else None
    axes = head_axes(groups, heads, apart)
    return Depth2("heads", axes, level1, level2, bias, path, after, None, groups, locked, pair=True)


def _latent(family: Family, layer: nn.Module, heads: int) -> Depth2:
    """Heads that make keys and values of one vector: each has rows of its own in what makes them, and in no more."""
    assert family.latent is not None
    path, (reader, maker) = family.attention, family.latent
    both = getattr(layer.get_submodule(path), family.latent_queries, None) is not None
    level1: tuple[Slab, ...] = ()
    for name in (family.latent_queries if both else family.queries, maker):
        linear: Any = layer.get_submodule(f"{path}.{name}")
        level1 += _level1(layer, f"{path}.{name}", HEADS, heads, linear.weight.shape[0] // heads)
    level2, bias = _heads_output(layer, f"{path}.{family.output}", heads)
    after = family.norm_after_attention
    how: dict[str, Any] = {"pair": True, "reader": f"{path}.{reader}"}
    return Depth2("heads", head_axes(heads, heads), level1, level2, bias, path, after, None, heads, **how)


def _mixture(config: Any, family: Family, layer: nn.Module) -> Depth2:
    """Experts: whatever has an axis of their number follows them."""
    mixture = family.experts
    assert mixture is not None
    home, whole = family.mixture, layer.get_submodule(family.mixture.rstrip("."))
    units = int(getattr(config, mixture.number))
    down = f"{home}{mixture.experts}.{mixture.stored[-1][0]}"
    inside = [f"{home}{part}" for part in (mixture.experts, mixture.router, mixture.router_bias) if part is not None]
    slabs = [
        Slab(name, tuple(tensor.shape).index(units), (EXPERTS,), units, 1)
        for name, tensor in layer.state_dict().items()
        if name.startswith(tuple(inside)) and units in tensor.shape
    ]
    level2 = next(slab for slab in slabs if slab.name == down)
    others = tuple(slab for slab in slabs if slab is not level2)
    inner, channels = _inside_experts(layer, home + mixture.experts, mixture.stored)
    follows = mixture.shared_expert_width is None and shared_of(mixture, whole) is not None
    shared = _shared(layer, f"{home}{mixture.shared_expert}", inner) if follows else ()
    groups, open_ = (int(getattr(config, key) or 1) for key in mixture.groups) if mixture.groups else (1, 1)
    # Runs are compared by their two best experts, and those that are open hold all that a token meets.
    met = getattr(config, mixture.experts_per_token)
    # Hunyuan's config may have one for each block; the most is enough for all of them.
    met = max(met) if isinstance(met, list) else int(met)
    each = max(-(-met // open_), 2 if groups > 1 else 1)
    outer = family.norm_after_feed_forward
    # A group of experts that may be chosen needs one expert at least.
    least = max(each * groups, groups)
    axes = (
        Axis(EXPERTS, units, least=least, step=groups),
        Axis(EXPERT_CHANNELS, inner, multiple=EXPERTS_MULTIPLE, rounded=True, wide=256),
    )
    return Depth2(
        "experts",
        axes,
        (*others, *channels),
        level2,
        None,
        mixture.experts if mixture.parallel_norms else family.feed_forward,
        mixture.parallel_norms[1] if mixture.parallel_norms else outer,
        outer if mixture.parallel_norms else None,
        groups,
        pair=mixture.returns_scores,
        fixed=True,
        met=met,
        shared=shared,
        reader=mixture.router if mixture.parallel_norms else None,
    )


def _shared(layer: nn.Module, path: str, inner: int) -> tuple[Slab, ...]:
    """The expert that all tokens meet, in units of which there are as many as another expert has channels."""
    down: Any = layer.get_submodule(f"{path}.down_proj")
    times = down.weight.shape[1] // inner
    level1 = (
        slab
        for name in ("up_proj", "gate_proj")
        for slab in _level1(layer, f"{path}.{name}", (EXPERT_CHANNELS,), inner, times)
    )
    return (*level1, _level2(layer, f"{path}.down_proj", (EXPERT_CHANNELS,), inner, times)[0])


def shared_of(names: Experts, mixture: Any) -> Any:
    """The expert that all tokens meet; None where the config gives it no channels."""
    found = getattr(mixture, names.shared_expert, None) if names.shared_expert else None
    return found if found is not None and found.down_proj.weight.shape[1] else None


class ExpertLayout(NamedTuple):
    """How a module holds the matrices of all its experts."""

    inputs_first: bool
    """A matrix has an axis of inputs, then one of outputs."""
    in_turn: bool
    """Outputs of gate and up lie in turn, not one behind the other."""
    biased: bool


def layout_of(experts: Any) -> ExpertLayout:
    """What a module of experts says of itself; Llama 4's says nothing."""
    return ExpertLayout(
        getattr(experts, "is_transposed", True),
        not getattr(experts, "is_concatenated", True),
        getattr(experts, "has_bias", False),
    )


def _inside_experts(
    layer: nn.Module, path: str, stored: tuple[tuple[str, tuple[str, ...]], ...]
) -> tuple[int, tuple[Slab, ...]]:
    """How many channels each expert has, and what follows them in the matrices that hold all experts."""
    experts: Any = layer.get_submodule(path)
    (up, _), (down, _) = stored
    layout = layout_of(experts)
    axis = 1 if layout.inputs_first else 2
    inner = int(getattr(experts, down).shape[axis])

    def rows(name: str, axis: int) -> tuple[Slab, ...]:
        # Gate and up lie one behind the other, or in turn.
        if layout.in_turn:
            return (Slab(f"{path}.{name}", axis, (EXPERT_CHANNELS,), inner, 2),)
        return tuple(Slab(f"{path}.{name}", axis, (EXPERT_CHANNELS,), inner, 1, start) for start in (0, inner))

    biased = rows(f"{up}_bias", 1) if layout.biased else ()
    return inner, (*rows(up, 3 - axis), *biased, Slab(f"{path}.{down}", axis, (EXPERT_CHANNELS,), inner, 1))


def _feed_forward(family: Family, layer: nn.Module) -> Depth2:
    prefix = "" if family.feed_forward is None else f"{family.feed_forward}."
    down: Any = layer.get_submodule(prefix + family.down)
    channels = int(down.weight.shape[0 if isinstance(down, Conv1D) else 1])
    if family.fused_gate is not None:
        # Up first, as everywhere, although the gate's rows come first in the tensor.
        level1 = _level1(layer, prefix + family.fused_gate, (CHANNELS,), channels, 1, channels)
        level1 += _level1(layer, prefix + family.fused_gate, (CHANNELS,), channels, 1)
    else:
        level1 = _level1(layer, prefix + family.up, (CHANNELS,), channels, 1)
        if family.gate is not None:
            level1 += _level1(layer, prefix + family.gate, (CHANNELS,), channels, 1)
    level2, bias = _level2(layer, prefix + family.down, (CHANNELS,), channels, 1)
    axes = (Axis(CHANNELS, channels, rounded=True, wide=1024),)
    return Depth2("channels", axes, level1, level2, bias, family.feed_forward, family.norm_after_feed_forward)
