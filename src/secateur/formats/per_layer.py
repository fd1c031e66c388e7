"""Folder with a width for each block: the contents of its config.json, and the classes that load it.

The folder carries `modeling_secateur.py`, which builds stock layers of these widths, so that transformers loads the
folder with trust_remote_code and without this library. Inside this library the same classes are used, and no code of a
folder runs.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from secateur.base.errors import SecateurError
from secateur.base.quiet import quiet
from secateur.families.registry import FAMILIES, family_of
from secateur.formats.stock import config_keys, stock_config
from secateur.model import modeling_secateur
from secateur.model.axes import FEED_FORWARD, Width, axis_kinds, model_width
from secateur.model.config_file import TEXT, empty_model, stock_class
from secateur.model.describe import describe
from secateur.model.layer_sizes import BIASES, GROUPS, PER_GROUP, Keys, StoredNames, model_sizes, numbers
from secateur.model.modeling_secateur import IMAGES, PREFIX, SIZES, WIDTHS, overrides
from secateur.model.structure import Block
from secateur.model.units.heads import KV_GROUPS

MODELING_FILE = Path(modeling_secateur.__file__)
"""File that is written next to the weights."""

HEADED = {
    "AutoModelForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "AutoModelForTokenClassification": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
}
"""Auto classes that load the pruned model with a new classification head, with transformers' stock classes."""


def per_layer_unsupported(config: Any, block: Block, width: Width) -> str | None:
    """Return why a block cannot be written at a width, as a clause that ends in what to do; None if it can.

    Zero heads and zero channels are legal, and blocks may differ.
    """
    for module in block.modules:
        units = module.units_at(width)
        if module.locked and units not in ((module.units,) if module.fixed else (0, module.units)):
            none = "" if module.fixed else " or none"
            return f"{config.model_type} keeps all {module.units} {module.kind} of a block{none}, as {module.locked}"
    return None


def per_layer_config(
    raw_config: dict[str, Any],
    config: Any,
    *,
    widths: Mapping[int, Width],
    blocks: Sequence[Block],
    stored_names: StoredNames,
    biases: Mapping[int, tuple[bool, bool]],
    head_dim: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return the contents of config.json for a model whose blocks have different widths.

    Args:
        raw_config: Contents of the dense checkpoint's config.json; not changed.
        config: The config object of the dense model.
        widths: Widths of the pruned blocks; other blocks are dense.
        blocks: All dense blocks; the global values are the width of the first block.
        stored_names: Function that returns a tensor's names in the checkpoint, which older transformers use.
        biases: Whether the output projections (attention, feed-forward) of a block gained a bias.
        head_dim: Entries per head.

    Returns:
        A JSON-ready dictionary, read alike by transformers 4.57 and 5.
    """
    dense, keys = [block.width for block in blocks], layer_keys(config)
    first = model_width(dense)
    stored = stock_config(raw_config, config, width=first, head_dim=head_dim, dtype=dtype)
    # GPT-2, OPT and GPT-NeoX derive the head size from the number of heads. Without head_dim, other tools would derive
    # it from each layer's own number. Falcon's config has a property of this name, and cannot be given a head size.
    derived = isinstance(getattr(type(config), "head_dim", None), property)
    if not derived:
        stored["head_dim"] = stored.get("head_dim") or head_dim
    config_class = type(config)
    causal = stock_class(MODEL_FOR_CAUSAL_LM_MAPPING, config_class).__name__
    classes = {"AutoModel": MODEL_MAPPING[config_class].__name__, "AutoModelForCausalLM": causal}
    for auto, others in HEADED.items():
        if config_class in others:
            classes[auto] = stock_class(others, config_class).__name__
    stored["architectures"] = [PREFIX + causal]
    stored["auto_map"] = {auto: f"{MODELING_FILE.stem}.{PREFIX}{name}" for auto, name in classes.items()}
    # Key of the number of the feed-forward's units: of experts, if there are some.
    key = _feed_forward_key(first, keys)
    if key is not None and not any(_changes_shapes(blocks[index], width) for index, width in widths.items()):
        # A stock class that opens the folder by mistake warns of missing tensors and goes on with random ones; at a
        # width that no layer has, it fails.
        stored[key] = numbers(first, keys)[key] + 1
    usual = [dict.fromkeys(BIASES, False) | numbers(width, keys) for width in dense]
    everywhere = {key: count for layer in reversed(usual) for key, count in layer.items()}
    everywhere |= {} if key is None else {key: stored.get(key, everywhere[key])}
    layers = {}
    for index, before in enumerate(usual):
        values = before | dict(zip(BIASES, biases.get(index, (False, False)), strict=True))
        values |= numbers(widths.get(index, dense[index]), keys)
        # A block may have differed before (Gemma 4's last ones are twice as wide), and now have the usual number.
        if differing := {
            key: value for key, value in values.items() if value != everywhere[key] or value != before[key]
        }:
            layers[str(index)] = differing
    # A class that derives head sizes fails in a layer without heads: the values go under a key that it does not read.
    under_own_key = (
        family_of(config).stock.per_layer_by_type
        or derived
        or any(overrides(config, index) for index in range(len(dense)))
    )
    stored[WIDTHS if under_own_key else "per_layer_config"] = layers
    used = {key for values in layers.values() for key in values}
    stored[SIZES] = model_sizes(blocks, keys, stored_names, used)
    # A key that only some layers have must have a value for the others.
    stored |= {key: everywhere[key] for key in (PER_GROUP, *BIASES, *first) if key in used}
    if GROUPS in everywhere:
        # Falcon's fused layer reads this key, although its config has another key for the number.
        stored[GROUPS] = first[KV_GROUPS]
    # Otherwise transformers 5 refuses to read the global value of a key that a layer overrides.
    stored["allow_global_per_layer_attribute_access"] = True
    return stored


def multimodal_per_layer_config(multimodal_config: dict[str, Any], language_config: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of a multimodal model's config.json.

    Args:
        multimodal_config: Contents of the dense model's config.json.
        language_config: The language model's part, from `per_layer_config`.
    """
    config_class = CONFIG_MAPPING[multimodal_config["model_type"]]
    whole, inner = stock_class(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, config_class), MODEL_MAPPING[config_class]
    classes = {"AutoModel": inner.__name__, IMAGES: whole.__name__}
    kept = {key: value for key, value in language_config.items() if key not in ("architectures", "auto_map")}
    if named := multimodal_config[TEXT].get("architectures"):
        kept["architectures"] = named
    return multimodal_config | {
        TEXT: kept,
        "architectures": [PREFIX + whole.__name__],
        "auto_map": {auto: f"{MODELING_FILE.stem}.{PREFIX}{name}" for auto, name in classes.items()},
    }


def is_per_layer(config: Any) -> bool:
    """Return whether a config object comes from a folder of this format."""
    return bool(_own_classes(config.architectures))


def model_class(config: Any, multimodal_config: Mapping[str, Any] | None = None) -> Any:
    """Return the class on which to call `from_pretrained`: transformers' auto class, or a class of the modeling file
    for a folder of this format.

    `multimodal_config` holds the contents of a multimodal model's config.json. No code of the folder runs, and no class
    is registered.
    """
    if ours := _own_classes(
        config.architectures if multimodal_config is None else multimodal_config.get("architectures")
    ):
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


def _own_classes(names: Sequence[str] | None) -> list[str]:
    """Return the names in a config's `architectures` that belong to the modeling file."""
    return [name for name in names or () if name.startswith(PREFIX)]


def register() -> None:
    """Register classes so that AutoModelForCausalLM loads folders of this format without trust_remote_code, in this
    process.

    Dense models keep their stock classes: `architectures` in config.json decides.
    """
    for kind in FAMILIES:
        stock = stock_class(MODEL_FOR_CAUSAL_LM_MAPPING, CONFIG_MAPPING[kind])
        ours = getattr(modeling_secateur, PREFIX + stock.__name__)
        AutoModelForCausalLM.register(CONFIG_MAPPING[kind], (stock, ours), exist_ok=True)


def widths_of(config: Any) -> list[Width]:
    """Return the width of every block of a folder that this library wrote, of this format or the stock one.

    Args:
        config: The config object, or the contents of config.json.

    Raises:
        SecateurError: config.json gives a layer impossible numbers.
    """
    # transformers warns of every global value that is read where layers override it.
    with quiet():
        if isinstance(config, Mapping):
            config = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        stock = empty_model(stock_class(MODEL_FOR_CAUSAL_LM_MAPPING, type(config)), config)
        layers = stock.get_submodule(family_of(config).blocks).children()
        keys = layer_keys(config)
        return [_layer_width(config, index, describe(config, layer).width, keys) for index, layer in enumerate(layers)]


def _layer_width(config: Any, index: int, everywhere: Width, keys: Keys) -> Width:
    """Return a layer's width: the one that the global values of a config give, but for the layer's own numbers."""
    values = overrides(config, index)
    if odd := next((name for name, value in values.items() if type(value) not in (int, bool) or value < 0), None):
        raise SecateurError(
            f"layer {index} of the config has {values[odd]!r} for {odd}, which is not a number; prune again"
        )
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


def _feed_forward_key(width: Width, keys: Keys) -> str | None:
    """Return the config key of the number of experts, or else of channels; None if configs have no such key."""
    kinds = [kind for kind in axis_kinds().values() if kind.role == FEED_FORWARD and not kind.outer]
    return next((keys[(kind.name,)] for kind in reversed(kinds) if kind.name in width and (kind.name,) in keys), None)


def _changes_shapes(block: Block, width: Width) -> bool:
    """Return whether some tensor of a block that is stored at a width has another shape than in the dense block."""
    kept = (module for module in block.modules if module.units_at(width))
    return any(width[axis.name] != axis.units for module in kept for axis in module.axes)
