"""Description of a block: its modules, their axes and units, and the parts of tensors that follow each unit.

Most blocks have two modules, an attention and a feed-forward; some have one of them, or none. A module is input
projections, then one output projection, whose output is added to the residual stream. A *unit* is what can be removed:
a query head, a channel, an expert, a channel of every expert. A `Slab` is the part of one stored tensor that belongs to
units. A description holds names and sizes, no weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.model.axes import Axis, Width, axis_kinds, load_units

if TYPE_CHECKING:
    from secateur.families.family import Family

KeptUnits = Mapping[str, tuple[int, ...]]
"""Sorted indices of the units that a block keeps, by kind of units.

Channels of experts are listed only if some are removed. They have one numbering for the whole block: channel c of
expert e is e * channels + c, and the channels of the shared expert come last."""


@dataclass(frozen=True)
class Slab:
    """Part of a stored tensor that belongs to units: `size` consecutive entries along `axis` for each unit."""

    name: str
    """Tensor name inside the block, for example `self_attn.q_proj.weight`."""
    axis: int
    """Dimension of the tensor along which the units lie."""
    along: tuple[str, ...]
    """Names of the nested axes along which the units lie, the outermost first."""
    units: int
    """Number of units in the dense block."""
    size: int
    """Entries along `axis` of each unit."""
    offset: int = 0
    """First entry along `axis`; not zero if several layers are fused into one tensor."""
    run: int = 1
    """Number of units that lie next to each other before a gap."""
    gap: int = 0
    """Number of entries of other layers between two runs of units."""

    @property
    def layer(self) -> str:
        """Path of the layer inside the block."""
        return self.name.rpartition(".")[0]

    @property
    def bias(self) -> str:
        """Name of the bias of the same layer, whether the layer has a bias or not."""
        return f"{self.layer}.bias"


@dataclass(frozen=True)
class PrunableModule:
    """Module of a block: an attention, a token mixer, a feed-forward or a mixture of experts."""

    kind: str
    """Kind of its units."""
    axes: tuple[Axis, ...]
    """Axes along which the module can become narrower; an outer axis comes before the axes nested in it."""
    input_projections: tuple[Slab, ...]
    """Weights and biases of the input projections: query, key and value, or up and gate."""
    output_projection: Slab
    """Weight of the output projection. Units lie along its input dimension; its output dimension is the residual
    width."""
    bias: str | None
    """Name of the stored bias of the output projection; None without one."""
    path: str | None
    """Submodule whose output is added to the residual stream; None if the layers are children of the block itself."""
    post_norm: str | None
    """Norm between the output projection and the residual stream (Gemma 2 and 3, OLMo-2)."""
    outer_norm: str | None = None
    """Norm after `post_norm`, on the sum of the outputs of this module and a parallel one (Gemma 4)."""
    groups: int = 1
    """Number of KV groups or of groups of experts. All groups keep the same number of units."""
    locked: str | None = None
    """Reason why single units cannot be removed exactly; None if they can."""
    fixed: bool = False
    """Whether the module cannot be removed as a whole."""
    outputs: int = 1
    """Number of values that the submodule returns: its output, then attention weights or router scores."""
    experts_per_token: int = 0
    """Number of experts per token (top-k); zero without experts."""
    shared: tuple[Slab, ...] = ()
    """Input projections and output projection of a shared expert that is pruned with the other experts, else empty.

    The shared expert is `shared_multiple` times as wide as another expert and loses that many channels for each channel
    that the others lose."""
    input_reader: str | None = None
    """Layer that has the module's input where no input projection has it: latent attention, experts parallel to a
    feed-forward."""

    @property
    def slabs(self) -> tuple[Slab, ...]:
        """All slabs of the module."""
        return (*self.input_projections, *self.shared, self.output_projection)

    @property
    def input_layer(self) -> str:
        """Path of a layer whose input is the module's input; the output layer if no other layer has it."""
        if self.input_reader is not None:
            return self.input_reader
        return (
            self.input_projections[0].layer if self.input_projections and self.kind != "experts" else self.output_layer
        )

    @property
    def output_layer(self) -> str:
        """Path of the layer whose output is the module's output; for experts, the whole mixture."""
        return self.output_projection.layer if self.kind != "experts" else str(self.path)

    @property
    def shared_multiple(self) -> int:
        """Width of the shared expert over the width of another expert; 0 if the shared expert is not pruned."""
        return self.shared[0].size if self.shared else 0

    @property
    def channel_projections(self) -> tuple[Slab, ...]:
        """Weights of the input projections with one row for each channel: (up, gate) or (up,); empty for attention."""
        return tuple(
            slab for slab in self.input_projections if self.kind == "channels" and slab.name.endswith(".weight")
        )

    @property
    def role(self) -> str:
        """Place of the module in its block: `ATTENTION` or `FEED_FORWARD`, whatever stands there."""
        return axis_kinds()[self.axes[0].name].role

    @property
    def units(self) -> int:
        """Number of units: query heads, channels or experts."""
        return self.output_projection.units

    @property
    def size(self) -> int:
        """Inputs of the output projection per unit: the head dimension, or 1."""
        return self.output_projection.size

    @property
    def per_group(self) -> int:
        """Number of units per group."""
        return self.units // self.groups

    @property
    def kind_inside(self) -> str | None:
        """Kind of the units inside each unit: `channels` of experts; None without such units."""
        return next((axis.kind for axis in self.axes if axis.name not in self.output_projection.along), None)

    def width_of(self, kept: KeptUnits) -> dict[str, int]:
        """Return the module's number of kept units along each axis."""
        units = kept[self.kind]
        outer, *nested = self.output_projection.along
        found = {outer: len({unit // self.nested_units(outer) for unit in units})}
        found |= {axis: len(units) // max(found[outer], 1) for axis in nested}
        if self.kind_inside is not None:
            inside = len(kept.get(self.kind_inside, ())) // (len(units) + self.shared_multiple) or self.units_inside
            found |= {axis.name: inside for axis in self.axes if axis.name not in found}
        return found

    def can_become(self, width: Mapping[str, int]) -> bool:
        """Return whether one pruning makes the module this narrow: it removes units along one of nested axes only."""
        narrower = [name for name in self.output_projection.along if width[name] < self.axis(name).units]
        return len(narrower) <= 1 and all(width[axis.name] <= axis.units for axis in self.axes)

    @property
    def min_units(self) -> int:
        """Smallest number of units with which the module works; zero if the whole module can be removed."""
        return self.axes[0].min_units if self.fixed else 0

    @property
    def units_inside(self) -> int:
        """Number of units inside each unit: channels of each expert; zero without such units."""
        return next((axis.units for axis in self.axes if axis.name not in self.output_projection.along), 0)

    @property
    def bias_name(self) -> str:
        """Name of the output projection's bias, whether the checkpoint has one or not."""
        return self.output_projection.bias

    def is_prunable(self, kinds: Sequence[str]) -> bool:
        """Return whether the module has units of one of these kinds."""
        return any(axis.kind in kinds and axis.units for axis in self.axes)

    @property
    def may_gain_bias(self) -> bool:
        """Whether a bias of the output projection can be fitted: a norm after the projection would not keep it
        constant."""
        return self.post_norm is None and not self.fixed

    def axis(self, name: str) -> Axis:
        """Return the axis with a name."""
        return next(axis for axis in self.axes if axis.name == name)

    @property
    def cut_axes(self) -> tuple[Axis, ...]:
        """Axes with more than one unit; of a module with a single unit, its first axis."""
        return tuple(axis for axis in self.axes if axis.units > 1) or self.axes[:1]

    def nested_units(self, axis: str) -> int:
        """Return how many units one step along an axis removes: the units along the axes nested in it."""
        along = self.output_projection.along
        return math.prod(self.axis(name).units for name in along[along.index(axis) + 1 :])

    def enclosing_units(self, axis: str) -> int:
        """Return the number of units along the outer axes: each loses one unit for a step along this axis."""
        along = self.output_projection.along
        return math.prod(self.axis(name).units for name in along[: along.index(axis)])

    @property
    def removed(self) -> dict[str, int]:
        """Width of the removed module: zero along each of its axes."""
        return dict.fromkeys((axis.name for axis in self.axes), 0)

    def units_at(self, width: Width) -> int:
        """Return the number of units that stay at a width."""
        return width.product(self.output_projection.along)


@dataclass(frozen=True)
class Block:
    """Description of a block that is not pruned yet, or not pruned again: its modules, the shapes of its tensors."""

    modules: tuple[PrunableModule, ...]
    """Modules in the order in which they run, at most one of each kind."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every stored tensor, by its name inside the block."""
    buffers: frozenset[str] = frozenset()
    """Names of tensors that are not parameters, such as the correction bias of a router."""

    @property
    def modules_left(self) -> tuple[PrunableModule, ...]:
        """Modules that have units, in the order in which they run; an earlier pruning may have removed the others."""
        return tuple(module for module in self.modules if module.units)

    @property
    def axes(self) -> list[Axis]:
        """Axes of all modules."""
        return [axis for module in self.modules for axis in module.axes]

    def axes_in(self, role: str) -> list[Axis]:
        """Return the axes of the modules in a role."""
        return [axis for module in self.modules if module.role == role for axis in module.axes]

    @property
    def free_axes(self) -> list[Axis]:
        """Axes along which single units can be removed."""
        return [axis for axis in self.axes if not axis.locked]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of units of the modules."""
        return tuple(module.kind for module in self.modules)

    @property
    def removable_kinds(self) -> list[str]:
        """Kinds of units that can be removed, one for each module; token mixers are not among them."""
        return [module.kind for module in self.modules if module.axes[0].removable]

    def module(self, kind: str) -> PrunableModule:
        """Return the module with a kind of units."""
        return self.modules[self.kinds.index(kind)]

    def find(self, kind: str) -> PrunableModule | None:
        """Return the module with a kind of units; None if the block has none."""
        return self.module(kind) if kind in self.kinds else None

    @property
    def loses_heads(self) -> bool:
        """Whether query heads can be removed: single ones, or all of them."""
        return "heads" in self.kinds and not self.module("heads").fixed

    @property
    def heads_locked(self) -> str | None:
        """Reason why single query heads cannot be removed exactly; None if they can."""
        module = self.find("heads") or self.find("token_mixers")
        return "the block has no attention" if module is None else module.locked

    @property
    def parameters(self) -> int:
        """Number of all parameters, norms included."""
        return sum(math.prod(shape) for name, shape in self.shapes.items() if name not in self.buffers)

    @property
    def width(self) -> Width:
        """Width of the dense block."""
        return Width({axis.name: axis.units for axis in self.axes})

    def inside(self, module: PrunableModule) -> list[str]:
        """Return the names of the tensors that a removed module no longer has: all but the output projection's bias."""
        slabs = {slab.name for slab in module.slabs}
        path = f"{module.path}." if module.path else None
        return [
            name
            for name in self.shapes
            if name != module.bias_name and (name in slabs or (path is not None and name.startswith(path)))
        ]

    def shapes_at(self, width: Width, kind: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a module's tensors at a width, without the output projection's bias, which never
        leaves."""
        module = self.module(kind)
        if not module.units_at(width):
            return {}
        shapes = {name: list(self.shapes[name]) for name in self.inside(module)}
        for slab in module.slabs:
            shapes[slab.name][slab.axis] -= (slab.units - width.product(slab.along)) * slab.size
        return {name: tuple(shape) for name, shape in shapes.items()}

    def module_parameters(self, width: Width, kind: str) -> int:
        """Return the number of a module's parameters at a width, without the output projection's bias."""
        shapes = self.shapes_at(width, kind).items()
        return sum(math.prod(shape) for name, shape in shapes if name not in self.buffers)

    def active_parameters(self, width: Width, kind: str) -> float:
        """Return the number of a module's parameters that are active per token: of experts, only the routed ones."""
        module, shapes = self.module(kind), self.shapes_at(width, kind)
        if kind != "experts":
            return self.module_parameters(width, kind)
        own = [name for name in shapes if name.rpartition(".")[0] == module.output_projection.layer]
        inside = sum(math.prod(shapes[name]) for name in own)
        return self.module_parameters(width, kind) - inside * (1 - module.experts_per_token / module.units_at(width))

    def parameters_at(self, width: Width) -> int:
        """Return the number of the whole block's parameters at a width."""
        prunable = sum(self.module_parameters(self.width, kind) for kind in self.kinds)
        return self.parameters - prunable + sum(self.module_parameters(width, kind) for kind in self.kinds)


def combined(blocks: Sequence[Block], kinds: Sequence[str]) -> Block:
    """Return a block with the first module of each kind in some blocks, to describe widths that no block has."""
    modules = {module.kind: module for block in reversed(blocks) for module in block.modules}
    return Block(tuple(modules[kind] for kind in kinds), {})


def inputs_first(linear: Any) -> bool:
    """Return whether a layer stores its weight with inputs first (GPT-2's Conv1D) and not with outputs first
    (Linear)."""
    return hasattr(linear, "nf")


def input_projection(
    layer: Any, path: str, along: tuple[str, ...], units: int, size: int, offset: int = 0, run: int = 1, gap: int = 0
) -> tuple[Slab, ...]:
    """Return the slabs of a layer with units along its outputs: the weight, and the bias if there is one.

    Args:
        layer: The block.
        path: Path of the layer inside the block.
        along: Names of the axes along which the units lie, the outermost first.
        units: Number of units.
        size: Number of outputs of each unit.
        offset, run, gap: See `Slab`.
    """
    linear = layer.get_submodule(path)
    slabs = [Slab(f"{path}.weight", int(inputs_first(linear)), along, units, size, offset, run, gap)]
    if getattr(linear, "bias", None) is not None:
        slabs.append(Slab(f"{path}.bias", 0, along, units, size, offset, run, gap))
    return tuple(slabs)


def output_projection(
    layer: Any, path: str, along: tuple[str, ...], units: int, size: int | None = None
) -> tuple[Slab, str | None]:
    """Return the slab of the weight of a layer with units along its inputs, and the name of its bias; None without a
    bias.

    Without a size, units share all inputs in equal parts.
    """
    linear = layer.get_submodule(path)
    axis = int(not inputs_first(linear))
    slab = Slab(f"{path}.weight", axis, along, units, size or linear.weight.shape[axis] // units)
    return slab, slab.bias if getattr(linear, "bias", None) is not None else None


Describer = Callable[[Any, "Family", Any], "PrunableModule | None"]
"""Function of a config, a family and a block on any device that describes a module; None if the module is of another
kind."""

_DESCRIBERS: dict[str, list[tuple[int, Describer]]] = {}


def describes(role: str, *, rank: int) -> Callable[[Describer], Describer]:
    """Register a function that describes an attention or a feed-forward. Functions of lower rank are tried first."""

    def register(describer: Describer) -> Describer:
        _DESCRIBERS.setdefault(role, []).append((rank, describer))
        return describer

    return register


def described(role: str, config: Any, family: Family, layer: Any) -> PrunableModule | None:
    """Return the first description of a block's module in a role; None if the block has no such module."""
    load_units()
    ordered = (describer for _, describer in sorted(_DESCRIBERS[role], key=lambda one: one[0]))
    return next((module for describer in ordered if (module := describer(config, family, layer)) is not None), None)
