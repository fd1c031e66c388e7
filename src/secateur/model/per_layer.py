"""Models whose blocks differ in width, as the format `hf` stores them: the classes that load them, and their widths.

config.json has the sizes of the stock class, the numbers that differ in single layers, and the data by which
`modeling_secateur.py` cuts stock layers down to these numbers. Here the classes of this library's own copy of that file
are used, and no code of a folder runs.
"""

import math
from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from secateur.base.errors import SecateurError
from secateur.base.quiet import quiet
from secateur.checkpoints import modeling_secateur
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.checkpoints.config_file import config_of, empty_model, stock_class
from secateur.checkpoints.modeling_secateur import PREFIX, overrides, positive
from secateur.families.registry import family_of
from secateur.model.axes import Width, axis_kinds, config_keys
from secateur.model.describe import describe
from secateur.model.layer_sizes import Keys
from secateur.model.structure import Block

ALLOW = "allow_global_per_layer_attribute_access"
"""Config key without which transformers 5 refuses to read the global value of a key that a layer overrides."""


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
    return [describe(config, layer) for layer in network.get_submodule(family_of(config).blocks).children()]


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
