"""Blocks of a checkpoint, and the stock model that they belong to.

A model whose blocks differ in width can be pruned again. Its blocks are described as narrower stock blocks, and its
stock model has what the formats need to write it again.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.base.errors import SecateurError
from secateur.model.checkpoint import Checkpoint, described
from secateur.model.config_file import TEXT, prepared_config
from secateur.model.describe import describe
from secateur.model.layer_sizes import BIASES, PER_GROUP
from secateur.model.modeling_secateur import PREFIX, SIZES, WIDTHS
from secateur.model.narrowed import narrowed_block
from secateur.model.per_layer import ALLOW, is_per_layer, layer_keys, layer_width, stock_blocks
from secateur.model.structure import Block


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
    try:
        return narrowed_block(block, width, shapes)
    except ValueError as error:
        raise SecateurError(
            f"{checkpoint.source}: {SIZES} in config.json does not fit layer {index}: {error}; restore the file, or "
            "prune again"
        ) from error
