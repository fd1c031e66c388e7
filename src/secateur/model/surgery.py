"""Slicing of weights by slab: the only file that cuts tensors."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from secateur.checkpoints.expert_matrices import BlockTensor, ExpertMatrices, select_in_each
from secateur.checkpoints.modeling_secateur import resize
from secateur.model.axes import Width
from secateur.model.layer_sizes import BIAS_KEYS, layer_sizes, numbers
from secateur.model.structure import Block, KeptUnits, PrunableModule, Slab
from secateur.model.units.experts import EXPERT_CHANNELS


def entries(slab: Slab, keep: Sequence[int]) -> Tensor:
    """Return the positions of kept units along the slab's axis, counted from the beginning of the tensor."""
    units = torch.tensor(keep, dtype=torch.long)
    first = slab.offset + units * slab.size + units // slab.run * slab.gap
    return (first[:, None] + torch.arange(slab.size)).reshape(-1)


def rows_of(slab: Slab, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the part of a tensor that belongs to a slab, its axis first (units * size x ...); a view if it is
    contiguous."""
    stored = tensors[slab.name].movedim(slab.axis, 0)
    if not slab.gap:
        return stored[slab.offset : slab.offset + slab.units * slab.size]
    return stored[entries(slab, range(slab.units)).to(stored.device)]


def output_weight(module: PrunableModule, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the weight of the output projection with inputs first (a x o), as a view."""
    return tensors[module.output_projection.name].movedim(module.output_projection.axis, 0)


def output_tensor(module: PrunableModule, weight_ao: Tensor) -> Tensor:
    """Return the tensor of a weight of the output projection (a x o): the inverse of `output_weight`, contiguous."""
    return weight_ao.movedim(0, module.output_projection.axis).contiguous()


def kept_inputs(module: PrunableModule, keep: Sequence[int]) -> Tensor:
    """Return the indices of the output projection's inputs that belong to kept units."""
    return entries(module.output_projection, keep)


def slice_module(
    module: PrunableModule, tensors: Mapping[str, BlockTensor], keep: Sequence[int], channels: Sequence[int] = ()
) -> dict[str, BlockTensor]:
    """Return the tensors of a module with only the kept units, and of experts with only the kept channels if any are
    given."""
    parts: dict[tuple[str, int], list[Tensor]] = {}
    # Fused layers are several slabs of one tensor.
    for slab in module.slabs:
        if slab.along[0] == module.output_projection.along[0]:
            # A KV group stays while one of its heads does.
            each = module.units // slab.units
            kept = sorted({unit // each for unit in keep})
            parts.setdefault((slab.name, slab.axis), []).append(entries(slab, kept))
    found = {
        name: _selected(tensors[name], axis, torch.cat(index).sort().values) for (name, axis), index in parts.items()
    }
    return found | _slice_experts(module, {**tensors, **found}, len(keep), channels) if len(channels) else found


def _selected(tensor: BlockTensor, axis: int, index: Tensor) -> BlockTensor:
    """Return some entries of a tensor along an axis; of the matrices of all experts, some matrices."""
    return tensor.index_select(axis, index.to(tensor.device)) if isinstance(tensor, Tensor) else tensor.select(index)


def channels_by_expert(module: PrunableModule, experts: int, channels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the kept channels of each expert (experts x c) and of the shared expert, each counted from the expert's
    first channel."""
    indices = torch.tensor(channels)
    routed = len(indices) // (experts + module.shared_multiple) * experts
    return indices[:routed].view(experts, -1) % module.units_inside, indices[
        routed:
    ] - module.units * module.units_inside


def _slice_experts(
    module: PrunableModule, tensors: Mapping[str, BlockTensor], experts: int, channels: Sequence[int]
) -> dict[str, BlockTensor]:
    """Return the matrices of experts with only the kept channels of each expert."""
    channels_ec, shared = channels_by_expert(module, experts, channels)
    result = {slab.name: _selected(tensors[slab.name], slab.axis, shared) for slab in module.shared}
    places: dict[tuple[str, int], list[Tensor]] = {}
    for slab in sorted((*module.input_projections, module.output_projection), key=lambda slab: slab.offset):
        if slab.along == (EXPERT_CHANNELS,):
            positions = slab.offset + channels_ec[..., None] * slab.size + torch.arange(slab.size)
            places.setdefault((slab.name, slab.axis), []).append(positions.flatten(1))
    return result | {
        name: select_in_each(tensors[name], axis, torch.cat(parts, 1)) for (name, axis), parts in places.items()
    }


def slice_block(block: Block, tensors: Mapping[str, BlockTensor], kept: KeptUnits) -> dict[str, BlockTensor]:
    """Return all tensors of a block, sliced to the kept units. A module without units keeps only the bias of its output
    projection."""
    result = dict(tensors)
    for module in block.modules:
        if units := kept[module.kind]:
            channels = kept.get(module.kind_inside, ()) if module.kind_inside else ()
            result.update(slice_module(module, tensors, units, channels))
        else:
            for name in block.inside(module):
                del result[name]
    return result


def masked_weight(module: PrunableModule, tensors: Mapping[str, Tensor], keep: Sequence[int]) -> Tensor:
    """Return the stored weight of the output projection with zeros for removed units. The module then gives the same
    output as without these units."""
    weight = torch.zeros_like(output_weight(module, tensors))
    kept = kept_inputs(module, keep).to(weight.device)
    weight[kept] = output_weight(module, tensors)[kept]
    return output_tensor(module, weight)


def width_of(block: Block, kept: KeptUnits) -> Width:
    """Return the width of a block that keeps some units."""
    return Width({axis: number for module in block.modules for axis, number in module.width_of(kept).items()})


def first_units(block: Block, width: Width) -> KeptUnits:
    """Return the units of a block at a width: the first ones along each axis. Channels inside experts all stay."""
    return {module.kind: first_units_of(module.output_projection, module, width) for module in block.modules}


def first_units_of(slab: Slab, module: PrunableModule, width: Width) -> tuple[int, ...]:
    """Return the units of one slab of a module at a width: the first ones along each axis."""
    units = torch.arange(slab.units).view([module.axis(name).units for name in slab.along])
    for place, name in enumerate(slab.along):
        units = units.narrow(place, 0, width[name])
    return tuple(units.flatten().tolist())


def assign(module: nn.Module, name: str, tensor: BlockTensor | None) -> None:
    """Set a parameter or buffer of a module or of one of its submodules, of any shape, or the matrices of its experts;
    None deletes a parameter."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(tensor, ExpertMatrices):
        setattr(owner, leaf, tensor)
    elif leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        owner.register_parameter(leaf, None if tensor is None else nn.Parameter(tensor, requires_grad=False))


def tensors_of(layer: nn.Module) -> dict[str, BlockTensor]:
    """Return the parameters and buffers of a filled block, and the matrices of its experts, by name."""
    matrices = {
        f"{path}.{name}": value
        for path, part in layer.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, ExpertMatrices)
    }
    return layer.state_dict() | matrices


@contextmanager
def restored(layer: nn.Module) -> Iterator[None]:
    """Restore the tensors of a filled block on exit."""
    before = tensors_of(layer)
    try:
        yield
    finally:
        for name in tensors_of(layer).keys() - before.keys():
            assign(layer, name, None)
        for name, tensor in before.items():
            assign(layer, name, tensor)


def cut_down(layer: nn.Module, block: Block, width: Width, biases: Sequence[str] = ()) -> None:
    """Narrow a dense stock layer to a width, in place. The first units stay.

    Args:
        layer: The layer.
        block: Its description.
        width: Number of units that the layer keeps along each axis.
        biases: Names of biases of output projections that the layer gets in addition.
    """
    dense = numbers(block.width)
    changed = {key: count for key, count in numbers(width).items() if count != dense[key]}
    changed |= {BIAS_KEYS[module.role]: True for module in block.modules if module.bias_name in biases}
    resize(layer, layer_sizes(block), changed, SimpleNamespace(**dense))


def narrow(layer: nn.Module, block: Block, tensors: Mapping[str, Tensor], width: Width) -> None:
    """Put sliced tensors into a dense stock layer, and update the sizes that its submodules store."""
    cut_down(layer, block, width, [name for name in tensors if name not in block.shapes])
    for name, tensor in tensors.items():
        assign(layer, name, tensor)
