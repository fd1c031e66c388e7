"""Whole experts of a mixture, and the channels of each expert.

All experts keep the same number of channels. A shared expert whose width is a multiple of the width of the other
experts is pruned with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from secateur.model.axes import FEED_FORWARD, Axis, axis_kind
from secateur.model.structure import PrunableModule, Slab, describes, input_projection, output_projection

if TYPE_CHECKING:
    from secateur.families.family import Experts, Family

_NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS = axis_kind(
    "experts",
    "experts",
    FEED_FORWARD,
    "experts",
    "experts",
    total_attributes=_NUMBERS,
    config_keys=lambda family: {("experts",): (family.experts.number, *_NUMBERS)} if family.experts else {},
)
EXPERT_CHANNELS = axis_kind(
    "expert_channels",
    "channels",
    FEED_FORWARD,
    "channels in each expert",
    "expert channels",
    outer=("experts",),
    config_keys=lambda family: {("expert_channels",): (family.experts.expert_width,)} if family.experts else {},
)
EXPERTS_MULTIPLE = 8
"""Divisor of the number of channels of experts: their kernels need rows of 16 bytes in half precision."""


class ExpertLayout(NamedTuple):
    """Layout of the tensors that hold the matrices of all experts."""

    inputs_first: bool
    """Whether matrices have the order inputs, outputs."""
    in_turn: bool
    """Whether outputs of gate and up alternate; else all outputs of gate come first."""
    biased: bool


def layout_of(experts: Any) -> ExpertLayout:
    """Return the layout that a module of experts declares; Llama 4's module declares nothing."""
    return ExpertLayout(
        getattr(experts, "is_transposed", True),
        not getattr(experts, "is_concatenated", True),
        getattr(experts, "has_bias", False),
    )


def shared_expert(names: Experts, mixture: Any) -> Any:
    """Return the submodule of the shared expert; None if there is none or the config gives it no channels."""
    found = getattr(mixture, names.shared_expert, None) if names.shared_expert else None
    return found if found is not None and found.down_proj.weight.shape[1] else None


@describes(FEED_FORWARD, rank=5)
def mixture(config: Any, family: Family, layer: Any) -> PrunableModule | None:
    """Describe a mixture of experts; None if the block has none."""
    names = family.experts
    parent = None if names is None else dict(layer.named_modules()).get(family.mixture.rstrip("."))
    if names is None or not hasattr(parent, names.router):
        return None
    prefix = family.mixture
    number, per_token = int(getattr(config, names.number)), experts_per_token(config, names)
    rows = _rows_of_experts(layer, family, names, number)
    down = f"{prefix}{names.experts}.{names.stored[-1][0]}"
    output = next(slab for slab in rows if slab.name == down)
    channels, inside = _channels(layer, prefix + names.experts, names.stored)
    prunes_shared = names.shared_expert_width is None and shared_expert(names, parent) is not None
    groups, least = _groups(config, names, per_token)
    path, post_norm, outer_norm, input_reader = (
        family.feed_forward,
        family.norm_after(layer, "feed_forward"),
        None,
        None,
    )
    if names.parallel_norms is not None:
        path, post_norm, outer_norm, input_reader = names.experts, names.parallel_norms[1], post_norm, names.router
    return PrunableModule(
        "experts",
        (
            Axis(EXPERTS, number, min_units=least, step=groups),
            Axis(EXPERT_CHANNELS, channels, multiple=EXPERTS_MULTIPLE, rounded=True, rounds_from=256),
        ),
        (*(slab for slab in rows if slab is not output), *inside),
        output,
        None,
        path,
        post_norm,
        outer_norm,
        groups,
        outputs=1 + names.returns_scores,
        fixed=True,
        experts_per_token=per_token,
        shared=_shared(layer, f"{prefix}{names.shared_expert}", channels) if prunes_shared else (),
        input_reader=input_reader,
    )


def experts_per_token(config: Any, names: Experts) -> int:
    """Return the number of experts per token; the largest where a config has one for each block (Hunyuan)."""
    number = getattr(config, names.experts_per_token)
    return max(number) if isinstance(number, list) else int(number)


def _groups(config: Any, names: Experts, per_token: int) -> tuple[int, int]:
    """Return the number of groups of experts, and the fewest experts with which the router works."""
    groups, chosen = (int(getattr(config, key)) for key in names.groups) if names.groups else (1, 1)
    # Routers compare groups by their two best experts, and the chosen groups must hold all experts of a token.
    each = max(-(-per_token // chosen), 2 if groups > 1 else 1)
    return groups, each * groups


def _rows_of_experts(layer: Any, family: Family, names: Experts, number: int) -> list[Slab]:
    """Return the slabs of experts and router: all tensors with a dimension of the number of experts."""
    parts = (names.experts, names.router, names.router_bias)
    inside = tuple(f"{family.mixture}{part}" for part in parts if part is not None)
    return [
        Slab(name, tuple(tensor.shape).index(number), (EXPERTS,), number, 1)
        for name, tensor in layer.state_dict().items()
        if name.startswith(inside) and number in tensor.shape
    ]


def _channels(layer: Any, path: str, stored: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[int, tuple[Slab, ...]]:
    """Return the number of channels of each expert, and their slabs."""
    experts = layer.get_submodule(path)
    (up, _), (down, _) = stored
    layout = layout_of(experts)
    axis = 1 if layout.inputs_first else 2
    number = int(getattr(experts, down).shape[axis])

    def rows(name: str, axis: int) -> tuple[Slab, ...]:
        # The outputs of gate and up alternate, or all outputs of gate come first.
        starts, size = ((0,), 2) if layout.in_turn else ((0, number), 1)
        return tuple(Slab(f"{path}.{name}", axis, (EXPERT_CHANNELS,), number, size, start) for start in starts)

    biased = rows(f"{up}_bias", 1) if layout.biased else ()
    return number, (*rows(up, 3 - axis), *biased, Slab(f"{path}.{down}", axis, (EXPERT_CHANNELS,), number, 1))


def _shared(layer: Any, path: str, channels: int) -> tuple[Slab, ...]:
    """Return the slabs of the shared expert, divided into as many units as another expert has channels."""
    multiple = layer.get_submodule(f"{path}.down_proj").weight.shape[1] // channels
    along = (EXPERT_CHANNELS,)
    projections = (
        input_projection(layer, f"{path}.{name}", along, channels, multiple) for name in ("up_proj", "gate_proj")
    )
    output, _ = output_projection(layer, f"{path}.down_proj", along, channels, multiple)
    return (*(slab for slabs in projections for slab in slabs), output)
