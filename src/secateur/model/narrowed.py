"""Description of a block that was pruned before, made from the description of its stock layer and from its width.

Shapes alone do not tell where the units of a narrower block lie: in a fused layer, the first entry of the keys depends
on the number of query heads.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from secateur.model.axes import Axis, Width
from secateur.model.structure import Block, PrunableModule, Slab
from secateur.model.surgery import entries, first_units_of

REMOVED = "an earlier pruning removed the whole module"
"""Reason why nothing can be removed from a module without units."""


def narrowed_block(block: Block, width: Width, shapes: Mapping[str, tuple[int, ...]]) -> Block:
    """Return the description of a block that has the first units of a stock block.

    Args:
        block: The stock block.
        width: Number of units along each axis.
        shapes: Shapes of the tensors that the narrower block has.

    Raises:
        ValueError: A tensor has another shape than the width gives it; the message names the tensor.
    """
    for module in block.modules:
        for name, shape in block.shapes_at(width, module.kind).items():
            if shapes.get(name) != shape:
                raise ValueError(f"{name} is {list(shapes.get(name, ()))}, but its numbers make it {list(shape)}")
    attention, feed_forward = (_narrowed_module(module, width, shapes) for module in block.modules)
    return Block(attention, feed_forward, dict(shapes), block.buffers & shapes.keys())


def _narrowed_module(module: PrunableModule, width: Width, shapes: Mapping[str, tuple[int, ...]]) -> PrunableModule:
    """Return the description of one module of a narrower block."""
    bias = module.bias_name if module.bias_name in shapes else None
    if not module.units_at(width):
        return _removed_module(module, bias)
    slabs = {slab: _narrowed_slab(slab, module, width) for slab in module.slabs}
    outer, *nested = module.output_projection.along
    return replace(
        module,
        axes=tuple(_narrowed_axis(axis, width[axis.name]) for axis in module.axes),
        input_projections=tuple(slabs[slab] for slab in module.input_projections),
        output_projection=slabs[module.output_projection],
        shared=tuple(slabs[slab] for slab in module.shared),
        bias=bias,
        groups=width[outer] if nested else module.groups,
    )


def _removed_module(module: PrunableModule, bias: str | None) -> PrunableModule:
    """Return the description of a module without units, of which at most the bias of the output projection is left."""
    return replace(
        module,
        axes=tuple(Axis(axis.name, 0, min_units=0, locked=True) for axis in module.axes),
        input_projections=(),
        output_projection=replace(module.output_projection, units=0),
        bias=bias,
        locked=REMOVED,
        fixed=True,
    )


def _narrowed_axis(axis: Axis, units: int) -> Axis:
    """Return an axis with fewer units; whether they are rounded depends on the number in the stock block."""
    return replace(axis, units=units, rounds_from=0 if axis.units >= axis.rounds_from else axis.rounds_from)


def _narrowed_slab(slab: Slab, module: PrunableModule, width: Width) -> Slab:
    """Return a slab with the first units; it moves forward by the removed entries of the slabs before it."""
    same = [other for other in module.slabs if (other.name, other.axis) == (slab.name, slab.axis)]
    removed = torch.cat([_removed_entries(other, module, width) for other in same])
    kept = first_units_of(slab, module, width)
    return replace(
        slab,
        units=len(kept),
        run=sum(unit < slab.run for unit in kept),
        offset=slab.offset - _count(removed, 0, slab.offset),
        gap=slab.gap - _count(removed, slab.offset + slab.run * slab.size, slab.gap),
    )


def _removed_entries(slab: Slab, module: PrunableModule, width: Width) -> Tensor:
    """Return the positions, along the slab's axis, of the units that a narrower block does not have."""
    kept = set(first_units_of(slab, module, width))
    return entries(slab, [unit for unit in range(slab.units) if unit not in kept])


def _count(positions: Tensor, start: int, length: int) -> int:
    """Return how many positions lie in a range."""
    return int(((positions >= start) & (positions < start + length)).sum())
