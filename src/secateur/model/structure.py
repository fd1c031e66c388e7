"""What a prunable block looks like, as frozen data: every other file speaks in these terms.

A Transformer block holds two depth-2 modules (level-1 layers in parallel, then one level-2 layer).
Pruning removes *units*: query heads (with the key/value heads that no kept query head uses) from the
attention, channels from the feed-forward; where that is a mixture, whole experts, or as many channels of each. A `Slab`
says which part of a stored tensor follows a unit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from secateur.model.axes import Axis, Width, axis_kinds

KeptUnits = Mapping[str, tuple[int, ...]]
"""Indices of the units that a block keeps, sorted, by kind: those of each module. Channels of experts are listed where
some leave, numbered through: those of the second expert behind those of the first, the shared expert's last."""


@dataclass(frozen=True)
class Slab:
    """The part of one stored tensor whose `axis` runs over units, `size` consecutive entries each."""

    name: str
    """Tensor name inside the block, for example `self_attn.q_proj.weight`."""
    axis: int
    along: tuple[str, ...]
    """Names of the nested axes along which the units lie, the outermost first."""
    units: int
    """Their number in the dense block."""
    size: int
    offset: int = 0
    """First entry along `axis`; not zero where several layers are fused into one tensor."""
    run: int = 1
    gap: int = 0
    """So many entries of other layers follow each `run` of units."""

    @property
    def layer(self) -> str:
        """Path of the layer, inside the block."""
        return self.name.rpartition(".")[0]

    @property
    def bias(self) -> str:
        """The name that the bias of the same layer has, if there is one."""
        return f"{self.layer}.bias"


@dataclass(frozen=True)
class PrunableModule:
    """One prunable module of a block."""

    kind: str
    axes: tuple[Axis, ...]
    """Directions in which the module can become narrower, nested ones from the outermost on."""
    input_projections: tuple[Slab, ...]
    """Every level-1 weight and bias, those of the query, key and value or of the up and gate layers."""
    output_projection: Slab
    """The level-2 weight; its `axis` is the inner one, the other one is the residual width."""
    bias: str | None
    """Name of the stored level-2 bias, if the architecture has one."""
    path: str | None
    """The submodule whose output joins the residual stream; None where the layers hang in the block itself."""
    post_norm: str | None
    """A norm between level 2 and the residual stream (Gemma 2 and 3, OLMo-2)."""
    outer_norm: str | None = None
    """A norm behind that one, on the sum of this module's output and another's."""
    groups: int = 1
    """Number of KV groups, or of groups of experts, all of which keep equally many units."""
    locked: str | None = None
    """Why no unit can be removed without changing what the others compute, where that is so."""
    fixed: bool = False
    """Whether the module as a whole has to stay."""
    returns_tuple: bool = False
    """Its submodule returns something else behind the output: attention weights, or the router's scores."""
    experts_per_token: int = 0
    """Experts that a token meets."""
    shared: tuple[Slab, ...] = ()
    """Of the expert that all tokens meet, where its width follows from that of the others: level 1, then level 2. A
    unit is as many of its channels as leave with one of each of the others; they are counted behind all of those."""
    input_reader: str | None = None
    """A layer whose input is the module's, where no level-1 layer has it: heads that share a latent vector, experts
    beside a feed-forward."""

    @property
    def slabs(self) -> tuple[Slab, ...]:
        """Of both levels."""
        return (*self.input_projections, *self.shared, self.output_projection)

    @property
    def input_layer(self) -> str:
        """A layer, of level 1 as a rule, whose input is the module's input; the level-2 layer where none is known."""
        if self.input_reader is not None:
            return self.input_reader
        return (
            self.input_projections[0].layer if self.input_projections and self.kind != "experts" else self.output_layer
        )

    @property
    def output_layer(self) -> str:
        """The level-2 layer; of experts, which have one each, the whole mixture."""
        return self.output_projection.layer if self.kind != "experts" else str(self.path)

    @property
    def shared_multiple(self) -> int:
        """How many times as wide as another expert the shared one is; 0 where its width does not follow from theirs."""
        return self.shared[0].size if self.shared else 0

    @property
    def channel_projections(self) -> tuple[Slab, ...]:
        """Level-1 weights whose rows feed level-2 columns one to one: (up, gate), (up,); empty for attention."""
        return tuple(
            slab for slab in self.input_projections if self.kind == "channels" and slab.name.endswith(".weight")
        )

    @property
    def role(self) -> str:
        """Place of the module in its block: `ATTENTION` or `FEED_FORWARD`, whatever stands there."""
        return axis_kinds()[self.axes[0].name].role

    @property
    def units(self) -> int:
        """Query heads, channels or experts."""
        return self.output_projection.units

    @property
    def size(self) -> int:
        """Level-2 input entries per unit: the head dimension, or 1."""
        return self.output_projection.size

    @property
    def per_group(self) -> int:
        """Query heads per key/value head; for channels, all of them."""
        return self.units // self.groups

    @property
    def kind_inside(self) -> str | None:
        """Kind of the units inside each unit: channels of experts."""
        return next((axis.kind for axis in self.axes if axis.name not in self.output_projection.along), None)

    def width_of(self, kept: KeptUnits) -> dict[str, int]:
        """Return the width that a selection of units amounts to."""
        units = kept[self.kind]
        outer, *nested = self.output_projection.along
        found = {outer: len({unit // self.nested_units(outer) for unit in units})}
        found |= {axis: len(units) // max(found[outer], 1) for axis in nested}
        if self.kind_inside is not None:
            inner = len(kept.get(self.kind_inside, ())) // (len(units) + self.shared_multiple) or self.units_inside
            found |= {axis.name: inner for axis in self.axes if axis.name not in found}
        return found

    @property
    def min_units(self) -> int:
        """Smallest number of units that the module works with; zero where it may go as a whole."""
        return self.axes[0].min_units if self.fixed else 0

    @property
    def units_inside(self) -> int:
        """Channels of each expert, numbered through: those of the second expert follow those of the first."""
        return next((axis.units for axis in self.axes if axis.name not in self.output_projection.along), 0)

    @property
    def bias_name(self) -> str:
        """What level 2's bias is called, or would be."""
        return self.output_projection.bias

    def is_prunable(self, kinds: Sequence[str]) -> bool:
        """Return whether the module has an axis of one of these kinds of units."""
        return any(axis.kind in kinds for axis in self.axes)

    @property
    def may_gain_bias(self) -> bool:
        """A level-2 bias can be fitted: behind a norm, what is constant in the residual stream is no bias of it."""
        return self.post_norm is None and not self.fixed

    def axis(self, name: str) -> Axis:
        """Return the axis of a name."""
        return next(axis for axis in self.axes if axis.name == name)

    @property
    def cut_axes(self) -> tuple[Axis, ...]:
        """Axes with more than one unit; of a module with a single unit, its first axis."""
        return tuple(axis for axis in self.axes if axis.units > 1) or self.axes[:1]

    def nested_units(self, axis: str) -> int:
        """Return how many neighbouring units leave with one number of an axis: those along the axes nested in it."""
        along = self.output_projection.along
        return math.prod(self.axis(name).units for name in along[along.index(axis) + 1 :])

    def enclosing_units(self, axis: str) -> int:
        """Return how many units leave at once, one from each number of the axes that hold this one."""
        along = self.output_projection.along
        return math.prod(self.axis(name).units for name in along[: along.index(axis)])

    @property
    def removed(self) -> dict[str, int]:
        """Zero along each axis: the width of a module that has left as a whole."""
        return dict.fromkeys((axis.name for axis in self.axes), 0)

    def units_at(self, width: Width) -> int:
        """Return how many units stay at a width."""
        return width.product(self.output_projection.along)


@dataclass(frozen=True)
class Block:
    """The two modules of a dense block and the shapes of its tensors."""

    attention: PrunableModule
    feed_forward: PrunableModule
    shapes: dict[str, tuple[int, ...]]
    """Of every tensor, by its name inside the block."""

    @property
    def modules(self) -> tuple[PrunableModule, PrunableModule]:
        """Both, in the order in which they run and in which `KINDS` has them."""
        return self.attention, self.feed_forward

    @property
    def axes(self) -> list[Axis]:
        """Axes of all modules."""
        return [axis for module in self.modules for axis in module.axes]

    @property
    def free_axes(self) -> list[Axis]:
        """Axes along which single units can be removed."""
        return [axis for axis in self.axes if not axis.locked]

    @property
    def kinds(self) -> tuple[str, str]:
        """Of the units in either."""
        return self.attention.kind, self.feed_forward.kind

    @property
    def removable_kinds(self) -> list[str]:
        """Kinds of units that can leave, one for each module: token mixers are not among them."""
        return [module.kind for module in self.modules if module.axes[0].removable]

    def module(self, kind: str) -> PrunableModule:
        """The module that holds units of that kind."""
        return self.modules[self.kinds.index(kind)]

    @property
    def parameters(self) -> int:
        """All parameters, norms included."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def width(self) -> Width:
        """The dense width."""
        return Width({axis.name: axis.units for axis in self.axes})

    def inside(self, module: PrunableModule) -> list[str]:
        """Tensors that go with the module's last unit: all of it but the level-2 bias, which is still added."""
        slabs = {slab.name for slab in module.slabs}
        path = f"{module.path}." if module.path else None
        return [
            name
            for name in self.shapes
            if name != module.bias_name and (name in slabs or (path is not None and name.startswith(path)))
        ]

    def shapes_at(self, width: Width, kind: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a module's tensors at a width, without the level-2 bias, which stays whatever goes."""
        module = self.module(kind)
        if not module.units_at(width):
            return {}
        shapes = {name: list(self.shapes[name]) for name in self.inside(module)}
        for slab in module.slabs:
            shapes[slab.name][slab.axis] -= (slab.units - width.product(slab.along)) * slab.size
        return {name: tuple(shape) for name, shape in shapes.items()}

    def module_parameters(self, width: Width, kind: str) -> int:
        """Parameters of a module at a width, without the level-2 bias; exact, from the stored shapes."""
        return sum(map(math.prod, self.shapes_at(width, kind).values()))

    def active_parameters(self, width: Width, kind: str) -> float:
        """Parameters of a module that a token meets, on average: of experts, those that it is routed to."""
        module, shapes = self.module(kind), self.shapes_at(width, kind)
        if kind != "experts":
            return self.module_parameters(width, kind)
        own = [name for name in shapes if name.rpartition(".")[0] == module.output_projection.layer]
        inside = sum(math.prod(shapes[name]) for name in own)
        return self.module_parameters(width, kind) - inside * (1 - module.experts_per_token / module.units_at(width))

    def parameters_at(self, width: Width) -> int:
        """Parameters of the whole block at a width."""
        prunable = sum(math.prod(self.shapes[name]) for module in self.modules for name in self.inside(module))
        return self.parameters - prunable + sum(self.module_parameters(width, kind) for kind in self.kinds)
