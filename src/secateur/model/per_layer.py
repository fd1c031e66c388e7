"""Models whose blocks differ in width, as the format `hf` stores them: their classes, widths and blocks.

config.json has the sizes of the stock class, the numbers that differ in single layers, and the data by which
`modeling_secateur.py` cuts stock layers down to these numbers. Here the classes of this library's own copy of that file
are used, and no code of a folder runs.

Such a model can be pruned again. Its blocks are described as narrower stock blocks, and its stock model has what the
formats need to write it again.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from secateur.base.errors import SecateurError
from secateur.base.quiet import quiet
from secateur.checkpoints import modeling_secateur
from secateur.checkpoints.checkpoint import Checkpoint, described
from secateur.checkpoints.config_file import (
    BIASES,
    PER_GROUP,
    TEXT,
    config_of,
    empty_model,
    has_own_code,
    prepared_config,
    stock_class,
)
from secateur.checkpoints.modeling_secateur import PREFIX, SIZES, WIDTHS, overrides, positive
from secateur.families.registry import family_of
from secateur.model.axes import Axis, Width, axis_kinds, config_keys
from secateur.model.describe import describe_all
from secateur.model.layer_sizes import Keys
from secateur.model.structure import Block, PrunableModule, Slab
from secateur.model.surgery import entries, first_units_of

ALLOW = "allow_global_per_layer_attribute_access"
"""Config key without which transformers 5 refuses to read the global value of a key that a layer overrides."""
REMOVED = "an earlier pruning removed the whole module"
"""Reason why nothing can be removed from a module without units."""


def is_per_layer(config: Any, multimodal_config: Mapping[str, Any] | None = None) -> bool:
    """Return whether a config object comes from a folder of the format `hf`; see `model_class` for the arguments."""
    return bool(_own_classes(config, multimodal_config))


def model_class(config: Any, multimodal_config: Mapping[str, Any] | None = None) -> Any:
    """Return the class on which to call `from_pretrained`: transformers' auto class, or a class of the modeling file
    for a folder of the format `hf`.

    `multimodal_config` holds the contents of a multimodal model's config.json. No code of the folder runs, and no class
    is registered.
    """
    if ours := _own_classes(config, multimodal_config):
        if has_own_code(config):
            return modeling_secateur.per_layer(stock_class(MODEL_FOR_CAUSAL_LM_MAPPING, type(config)))
        try:
            return getattr(modeling_secateur, ours[0])
        except (AttributeError, TypeError) as error:
            raise SecateurError(f"config.json names the class {ours[0]}, which does not exist; prune again") from error
    return AutoModelForCausalLM if multimodal_config is None else AutoModelForImageTextToText


def decoder_class(config: Any, multimodal_config: Mapping[str, Any] | None) -> Any:
    """Return the class of the language model alone, also inside a multimodal model."""
    if multimodal_config is None or not is_per_layer(config, multimodal_config):
        return model_class(config)
    return getattr(modeling_secateur, PREFIX + stock_class(MODEL_FOR_CAUSAL_LM_MAPPING, type(config)).__name__)


def _own_classes(config: Any, multimodal_config: Mapping[str, Any] | None) -> list[str]:
    """Return the names of classes of the modeling file with which a config says to open the model."""
    names = config.architectures if multimodal_config is None else multimodal_config.get("architectures")
    return [name for name in names or () if name.startswith(PREFIX)]


def empty_decoder(checkpoint: Checkpoint) -> Any:
    """Build the language model of a checkpoint, with its parameters on the meta device.

    Raises:
        SecateurError: config.json describes no model, or gives a layer impossible numbers.
    """
    config, whole = checkpoint.config, checkpoint.multimodal_config
    if is_per_layer(config, whole):
        _check_numbers(config)
    return checkpoint.empty(decoder_class(config, whole))


def stock_blocks(config: Any) -> list[Block]:
    """Return the description of each block that the stock class makes of a config."""
    with positive(config):
        network = empty_model(stock_class(MODEL_FOR_CAUSAL_LM_MAPPING, type(config)), config)
    return describe_all(config, network.get_submodule(family_of(config).blocks).children())


def widths_of(config: Any) -> list[Width]:
    """Return the width of every block of a folder that this library wrote, of the format `hf` or `stock`.

    Args:
        config: The config object, or the contents of config.json.

    Raises:
        SecateurError: config.json gives a layer impossible numbers.
    """
    # transformers warns of every global value that is read where layers override it.
    with quiet():
        if isinstance(config, Mapping):
            config = config_of(dict(config))
        _check_numbers(config)
        keys = layer_keys(config)
        return [layer_width(config, i, block.width, keys) for i, block in enumerate(stock_blocks(config))]


def _check_numbers(config: Any) -> None:
    """Raise `SecateurError` if config.json gives a layer something else than numbers."""
    for index in range(config.num_hidden_layers):
        for name, value in overrides(config, index).items():
            if type(value) not in (int, bool) or value < 0:
                raise SecateurError(
                    f"layer {index} of the config has {value!r} for {name}, which is not a number; prune again"
                )


def layer_width(config: Any, index: int, everywhere: Width, keys: Keys) -> Width:
    """Return a layer's width: the one that the global values of a config give, but for the layer's own numbers."""
    values = overrides(config, index)
    counts = dict(everywhere)
    counts |= {
        axis: values[key] for (*outer, axis), key in keys.items() if not outer and axis in counts and key in values
    }
    for (*outer, axis), key in keys.items():
        if outer and axis in counts:
            total = values.get(key, everywhere.product((*outer, axis)))
            # If an outer axis has no key, each of its units has one nested unit: every head is a KV group.
            counts |= {name: total for name in outer if (name,) not in keys}
            counts[axis] = total // max(1, math.prod(counts[name] for name in outer))
    width = Width(counts)
    for along, key in keys.items():
        if key in values and along[0] in counts and width.product(along) != values[key]:
            raise SecateurError(
                f"layer {index} of the config has {values[key]} for {key}, but its other numbers give "
                f"{width.product(along)}; prune again"
            )
    return width


def layer_keys(config: Any) -> Keys:
    """Return the config keys of the numbers of units of one layer."""
    keys = {along: names[0] for along, names in config_keys(family_of(config)).items()}
    kinds = (kind for kind in axis_kinds().values() if kind.layer_key and all((outer,) in keys for outer in kind.outer))
    return keys | {(kind.name,): str(kind.layer_key) for kind in kinds}


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
        stock = StockModel(config, raw, whole, describe_all(config, layers))
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
    modules = tuple(_narrowed_module(module, width, shapes) for module in block.modules)
    return Block(modules, shapes, block.buffers & shapes.keys())


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
