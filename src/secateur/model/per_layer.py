"""Models whose blocks differ in width, as the format `hf` stores them: the classes that load them, and their blocks.

config.json has the sizes of the stock class, the numbers that differ in single layers, and the data by which
`modeling_secateur.py` cuts stock layers down to these numbers. Here the classes of this library's own copy of that file
are used, and no code of a folder runs.

Such a model can be pruned again. Its blocks are described as narrower stock blocks, and its stock model has what the
formats need to write it again.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from secateur.base.errors import SecateurError
from secateur.base.quiet import quiet
from secateur.families.registry import family_of
from secateur.model import modeling_secateur
from secateur.model.axes import Width, axis_kinds, config_keys
from secateur.model.checkpoint import Checkpoint, described
from secateur.model.config_file import TEXT, config_of, empty_model, prepared_config, stock_class
from secateur.model.describe import describe
from secateur.model.layer_sizes import BIASES, PER_GROUP, Keys
from secateur.model.modeling_secateur import PREFIX, SIZES, WIDTHS, overrides
from secateur.model.narrowed import narrowed_block
from secateur.model.structure import Block

ALLOW = "allow_global_per_layer_attribute_access"
"""Config key without which transformers 5 refuses to read the global value of a key that a layer overrides."""


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


def is_per_layer(config: Any, multimodal_config: Mapping[str, Any] | None = None) -> bool:
    """Return whether a config object comes from a folder of the format `hf`; see `model_class` for the arguments."""
    return bool(_own_classes(_architectures(config, multimodal_config)))


def model_class(config: Any, multimodal_config: Mapping[str, Any] | None = None) -> Any:
    """Return the class on which to call `from_pretrained`: transformers' auto class, or a class of the modeling file
    for a folder of the format `hf`.

    `multimodal_config` holds the contents of a multimodal model's config.json. No code of the folder runs, and no class
    is registered.
    """
    if ours := _own_classes(_architectures(config, multimodal_config)):
        try:
            return getattr(modeling_secateur, ours[0])
        except (AttributeError, TypeError) as error:
            raise SecateurError(f"config.json names the class {ours[0]}, which does not exist; prune again") from error
    return AutoModelForCausalLM if multimodal_config is None else AutoModelForImageTextToText


def decoder_class(config: Any, multimodal_config: Mapping[str, Any] | None) -> Any:
    """Return the class of the language model alone, also inside a multimodal model."""
    if multimodal_config is None or not _own_classes(multimodal_config.get("architectures")):
        return model_class(config)
    return getattr(modeling_secateur, PREFIX + stock_class(MODEL_FOR_CAUSAL_LM_MAPPING, type(config)).__name__)


def _architectures(config: Any, multimodal_config: Mapping[str, Any] | None) -> Sequence[str] | None:
    """Return the names of the classes that a config says to open the model with."""
    return config.architectures if multimodal_config is None else multimodal_config.get("architectures")


def _own_classes(names: Sequence[str] | None) -> list[str]:
    """Return the names in a config's `architectures` that belong to the modeling file."""
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
    return StockModel(**fields, blocks=_stock_blocks(fields["config"]))


def _stock_blocks(config: Any) -> list[Block]:
    """Return the description of each block that the stock class makes of a config."""
    network = empty_model(stock_class(MODEL_FOR_CAUSAL_LM_MAPPING, type(config)), config)
    return [describe(config, layer) for layer in network.get_submodule(family_of(config).blocks).children()]


def _without_layers(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of a config.json, or of a part of it, without what holds for single layers."""
    # Stock classes that read `per_layer_config` themselves keep it; see `WIDTHS`.
    stored = WIDTHS if WIDTHS in raw else "per_layer_config"
    added = {stored, SIZES, ALLOW, "auto_map", PER_GROUP, *BIASES}
    kept = {key: copy.deepcopy(value) for key, value in raw.items() if key not in added}
    if kept.get("architectures"):
        kept["architectures"] = [name.removeprefix(PREFIX) for name in kept["architectures"]]
    return kept


def _own_block(checkpoint: Checkpoint, stock: StockModel, index: int, layer: nn.Module) -> Block:
    """Return the description of a block that may be narrower than the stock block."""
    config, block = checkpoint.config, stock.blocks[index]
    width = _layer_width(config, index, block.width, layer_keys(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    try:
        return narrowed_block(block, width, shapes)
    except ValueError as error:
        raise SecateurError(
            f"{checkpoint.source}: {SIZES} in config.json does not fit layer {index}: {error}; restore the file, or "
            "prune again"
        ) from error


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
        return [_layer_width(config, i, block.width, keys) for i, block in enumerate(_stock_blocks(config))]


def _check_numbers(config: Any) -> None:
    """Raise `SecateurError` if config.json gives a layer something else than numbers."""
    for index in range(config.num_hidden_layers):
        for name, value in overrides(config, index).items():
            if type(value) not in (int, bool) or value < 0:
                raise SecateurError(
                    f"layer {index} of the config has {value!r} for {name}, which is not a number; prune again"
                )


def _layer_width(config: Any, index: int, everywhere: Width, keys: Keys) -> Width:
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
