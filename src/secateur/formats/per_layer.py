"""Format `hf`: a folder with a width for each block, and a modeling file that transformers runs.

The folder carries `modeling_secateur.py`, which builds stock layers of these widths, so that transformers loads the
folder with trust_remote_code and without this library. `secateur.model.per_layer` reads such a folder.
"""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING

from secateur.base.names import FORMATS
from secateur.checkpoints import modeling_secateur
from secateur.checkpoints.config_file import (
    BIASES,
    GROUPS,
    MAPPINGS,
    PER_GROUP,
    TEXT,
    own_code,
    stock_class,
    stock_classes,
)
from secateur.checkpoints.facts import head_dim
from secateur.checkpoints.modeling_secateur import IMAGES, PREFIX, SIZES, WIDTHS, overrides
from secateur.families.registry import FAMILIES, family_of
from secateur.formats.folder import Biases, Folder
from secateur.formats.stock import stock_config
from secateur.model.axes import FEED_FORWARD, Width, axis_kinds, config_keys, model_width
from secateur.model.layer_sizes import Keys, model_sizes, numbers
from secateur.model.per_layer import ALLOW, layer_keys
from secateur.model.stream import BlockStream
from secateur.model.structure import Block
from secateur.model.units.heads import KV_GROUPS
from secateur.plan.problem import Plan

MODELING_FILE = Path(modeling_secateur.__file__)
"""File that is written next to the weights."""


class HfFolder(Folder):
    """Folder of the format `hf`: each block has its own width."""

    declaration = FORMATS["hf"]
    code = (MODELING_FILE,)
    advice = "report this as a bug in secateur"

    def format_reason(self, width: Width) -> str | None:
        """Return why the first stock block with these axes cannot be written at a width."""
        block = self.block_with(width, self.block_range)
        return per_layer_unsupported(self.stream.checkpoint.config, block, width)

    def unsupported_plan(self, widths: Mapping[int, Width]) -> str | None:
        """Return why a block cannot be written at its width, for the first such block."""
        reasons = (HfFolder(self.stream, block_range=range(i, i + 1)).unsupported_reason(w) for i, w in widths.items())
        return next(filter(None, reasons), None)

    def write_code(self, folder: Path) -> None:
        """Write the modeling file; it imports the classes of a model with code of its own."""
        named = own_code(self.stream.checkpoint.config).get("auto_map", {})
        files = {auto: name.rpartition(".") for auto, name in named.items() if auto in MAPPINGS}
        lines = [f"from .{module} import {name}  # noqa: E402, F401\n" for module, _, name in files.values()]
        text = MODELING_FILE.read_text(encoding="utf-8") + "".join(["\n", *lines] if lines else [])
        (folder / MODELING_FILE.name).write_text(text, encoding="utf-8")

    def language_config(self, plan: Plan, biases: Biases) -> dict[str, Any]:
        """Return the stock model's config with the sizes that differ from block to block."""
        return per_layer_config(self.stream, plan.widths, biases, self.dtype)

    def whole_config(self, outer: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of config.json, with the classes of the modeling file."""
        config_class = CONFIG_MAPPING[outer["model_type"]]
        whole, inner = (stock_class(of, config_class) for of in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING))
        classes = {"AutoModel": inner.__name__, IMAGES: whole.__name__}
        kept = {key: value for key, value in own.items() if key not in ("architectures", "auto_map")}
        if named := outer[TEXT].get("architectures"):
            kept["architectures"] = named
        return outer | {
            TEXT: kept,
            "architectures": [PREFIX + whole.__name__],
            "auto_map": {auto: f"{MODELING_FILE.stem}.{PREFIX}{name}" for auto, name in classes.items()},
        }


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
    stream: BlockStream, widths: Mapping[int, Width], biases: Biases, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the contents of config.json for a model whose blocks have different widths.

    Args:
        stream: The dense model. The global values are the width of the stock model's first block.
        widths: Widths of the pruned blocks.
        biases: Whether output projections have a bias that the stock class does not have; see `Biases`.
        dtype: Dtype of the weights.

    Returns:
        A JSON-ready dictionary, read alike by transformers 4.57 and 5.
    """
    config, blocks = stream.stock.config, stream.stock.blocks
    family, dense, keys = family_of(config), [block.width for block in blocks], layer_keys(config)
    final = [widths.get(index, block.width) for index, block in enumerate(stream.blocks)]
    first = model_width(dense)
    stored = stock_config(stream.stock.raw_config, config, width=first, dtype=dtype)
    # GPT-2, OPT and GPT-NeoX derive the head size from the number of heads. Without head_dim, other tools would derive
    # it from each layer's own number. Falcon's config has a property of this name, and cannot be given a head size.
    # Nor does a class of the checkpoint's own need the key.
    derived = isinstance(getattr(type(config), "head_dim", None), property) or bool(own_code(config))
    if not derived:
        stored["head_dim"] = stored.get("head_dim") or head_dim(config)
    classes = stock_classes(type(config))
    stored["architectures"] = [PREFIX + classes["AutoModelForCausalLM"].__name__]
    ours = {auto: f"{MODELING_FILE.stem}.{PREFIX}{stock.__name__}" for auto, stock in classes.items()}
    stored["auto_map"] = stored.get("auto_map", {}) | ours
    # Key of the number of the feed-forward's units, if the class reads it: of experts, if there are some.
    key = None if family.derives_channels else _feed_forward_key(first, keys)
    negative = None
    if not any(map(_changes_shapes, blocks, final)):
        # A stock class that opens the folder by mistake warns of missing tensors and goes on with random ones. It fails
        # at a width that no layer has, and if no layer has such units, at a negative number.
        if key is not None and any(numbers(width, keys).get(key) for width in final):
            names = next(names for names in config_keys(family).values() if names[0] == key)
            stored |= {name: stored[key] + 1 for name in names if name in stored}
        else:
            negative = key or "initializer_range"
            stored[negative] = -stored.get(negative, getattr(config, negative))
    usual = [dict.fromkeys(BIASES, False) | numbers(width, keys) for width in dense]
    everywhere = {key: count for layer in reversed(usual) for key, count in layer.items()}
    everywhere |= {} if key is None else {key: stored.get(key, everywhere[key])}
    layers = {}
    for index, before in enumerate(usual):
        values = before | biases.get(index, {})
        values |= numbers(final[index], keys)
        # A block may have differed before (Gemma 4's last ones are twice as wide), and now have the usual number.
        if differing := {
            key: value for key, value in values.items() if value != everywhere[key] or value != before[key]
        }:
            layers[str(index)] = differing
    # A class that derives head sizes fails in a layer without heads: the values go under a key that it does not read.
    under_own_key = (
        family.entry.stock.per_layer_by_type or derived or any(overrides(config, index) for index in range(len(dense)))
    )
    stored[WIDTHS if under_own_key else "per_layer_config"] = layers
    used = {key for values in layers.values() for key in values}
    stored[SIZES] = model_sizes(blocks, keys, stream.pieces, used)
    stored[SIZES] |= {} if negative is None else {"negative": negative}
    # A key that only some layers have must have a value for the others.
    stored |= {key: everywhere[key] for key in (PER_GROUP, *BIASES, *first) if key in used}
    if stored.get("output_router_logits"):
        # The loss that the stock class computes from them needs the same number of experts in all blocks.
        stored["output_router_logits"] = False
    if GROUPS in everywhere:
        # Falcon's fused layer reads this key, although its config has another key for the number.
        stored[GROUPS] = first[KV_GROUPS]
    stored[ALLOW] = True
    return stored


def register() -> None:
    """Register classes so that the auto classes load folders of this format without trust_remote_code, in this process.

    Dense models keep their stock classes.
    """
    for config_class in (CONFIG_MAPPING[kind] for kind in FAMILIES):
        classes = stock_classes(config_class)
        for auto, stock in classes.items():
            # One class, not several: transformers cannot choose among several for a config without `architectures`.
            getattr(transformers, auto).register(config_class, _either(stock), exist_ok=True)


def _either(stock: Any) -> Any:
    """Return an object for the place of a stock class; it makes a pruned model if the config has sizes of layers."""
    ours = getattr(modeling_secateur, PREFIX + stock.__name__)

    def chosen(config: Any) -> Any:
        return ours if hasattr(config, SIZES) else stock

    return SimpleNamespace(
        __name__=stock.__name__,
        __module__=stock.__module__,
        stock=stock,
        from_pretrained=lambda *given, config, **named: chosen(config).from_pretrained(*given, config=config, **named),
        _from_config=lambda config, **named: chosen(config)._from_config(config, **named),
    )


def _feed_forward_key(width: Width, keys: Keys) -> str | None:
    """Return the config key of the number of experts, or else of channels; None if configs have no such key."""
    kinds = [kind for kind in axis_kinds().values() if kind.role == FEED_FORWARD and not kind.outer]
    return next((keys[(kind.name,)] for kind in reversed(kinds) if kind.name in width and (kind.name,) in keys), None)


def _changes_shapes(block: Block, width: Width) -> bool:
    """Return whether some tensor of a block that is stored at a width has another shape than in the dense block."""
    kept = (module for module in block.modules if module.units_at(width))
    return any(width[axis.name] != axis.units for module in kept for axis in module.axes)
