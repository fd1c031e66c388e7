"""Blocks of a checkpoint, and the stock model that they belong to.

A model whose blocks differ in width can be pruned again. Its blocks are described as narrower stock blocks, and its
stock model has what the formats need to write it again.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.base.errors import SecateurError
from secateur.checkpoints.checkpoint import Checkpoint, described
from secateur.checkpoints.config_file import BIASES, PER_GROUP, TEXT, prepared_config
from secateur.checkpoints.modeling_secateur import PREFIX, SIZES, WIDTHS
from secateur.model.axes import Axis, Width
from secateur.model.describe import describe
from secateur.model.per_layer import ALLOW, is_per_layer, layer_keys, layer_width, stock_blocks
from secateur.model.structure import Block, PrunableModule, Slab
from secateur.model.surgery import entries, first_units_of

REMOVED = "an earlier pruning removed the whole module"
"""Reason why nothing can be removed from a module without units."""


def _narrowed_module(module: PrunableModule, width: Width, shapes: Mapping[str, tuple[int, ...]]) -> PrunableModule:
    """Return the description of a module that has the first units of a stock block's module.

    Args:
        module: The stock block's module.
        width: Number of units along each axis.
        shapes: Shapes of the narrower block's tensors.
    """
    bias = module.bias_name if module.bias_name in shapes else None
    if not module.units_at(width):
        return _removed_module(module, bias)
    slabs = {slab: _narrowed_slab(slab, module, width) for slab in module.slabs}
    outer, *nested = module.output_projection.along
    return replace(
        module,
        # Whether widths are rounded depends on the number of units in the stock block.
        axes=tuple(
            replace(axis, units=width[axis.name], rounds_from=0 if axis.units >= axis.rounds_from else axis.rounds_from)
            for axis in module.axes
        ),
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


@dataclass(frozen=True)
class StockModel:
    """Model as its stock class builds it, with the same sizes in all layers; for a dense model, the model itself.

    For a model whose blocks differ in width, it is the model before the first pruning.
    """

    config: Any
    """The config object."""
    raw_config: dict[str, Any]
    """Contents of config.json, or its part for the language model."""
    multimodal_config: dict[str, Any] | None
    """config.json of a multimodal model."""
    blocks: list[Block]
    """Description of each block."""


def describe_blocks(checkpoint: Checkpoint, layers: Iterable[nn.Module]) -> tuple[StockModel, list[Block]]:
    """Return the stock model of a checkpoint, and the description of each of its own blocks.

    Args:
        checkpoint: The model.
        layers: Its layers, from `empty_decoder`.

    Raises:
        SecateurError: Layers differ from the numbers that config.json gives them.
    """
    config, raw, whole = checkpoint.config, checkpoint.raw_config, checkpoint.multimodal_config
    if not is_per_layer(config, whole):
        stock = StockModel(config, raw, whole, [describe(config, layer) for layer in layers])
        return stock, stock.blocks
    stock = _stock_model(raw if whole is None else whole)
    return stock, [_own_block(checkpoint, stock, index, layer) for index, layer in enumerate(layers)]


def _stock_model(raw: dict[str, Any]) -> StockModel:
    """Return the stock model of the contents of a config.json."""
    raw = _without_layers(raw)
    if isinstance(raw.get(TEXT), dict):
        raw[TEXT] = _without_layers(raw[TEXT])
    fields = described(raw, prepared_config(raw))
    return StockModel(**fields, blocks=stock_blocks(fields["config"]))


def _without_layers(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of a config.json, or of a part of it, without what holds for single layers."""
    # Stock classes that read `per_layer_config` themselves keep it; see `WIDTHS`.
    stored = WIDTHS if WIDTHS in raw else "per_layer_config"
    added = {stored, SIZES, ALLOW, "auto_map", PER_GROUP, *BIASES}
    kept = {key: copy.deepcopy(value) for key, value in raw.items() if key not in added}
    if (key := raw.get(SIZES, {}).get("negative")) is not None:
        kept[key] = abs(kept[key])
    if kept.get("architectures"):
        kept["architectures"] = [name.removeprefix(PREFIX) for name in kept["architectures"]]
    return kept


def _own_block(checkpoint: Checkpoint, stock: StockModel, index: int, layer: nn.Module) -> Block:
    """Return the description of a block that may be narrower than the stock block."""
    config, block = checkpoint.config, stock.blocks[index]
    width = layer_width(config, index, block.width, layer_keys(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    for module in block.modules:
        for name, shape in block.shapes_at(width, module.kind).items():
            if shapes.get(name) != shape:
                raise SecateurError(
                    f"{checkpoint.source}: {SIZES} in config.json does not fit layer {index}: {name} is "
                    f"{list(shapes.get(name, ()))}, but its numbers make it {list(shape)}; restore the file, or prune "
                    "again"
                )
    attention, feed_forward = (_narrowed_module(module, width, shapes) for module in block.modules)
    return Block(attention, feed_forward, shapes, block.buffers & shapes.keys())
