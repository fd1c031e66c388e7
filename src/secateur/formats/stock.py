"""Format `stock`: a folder with one width for all blocks, which the standard transformers class opens.

Config classes differ in their keys and in the numbers of heads that they accept, and transformers renamed the rotary
settings between 4.57 and 5. The families' entries hold these facts. Both spellings are written, so that both versions
build the same model.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur.base.names import FORMATS
from secateur.checkpoints.config_file import own_code
from secateur.checkpoints.facts import head_dim
from secateur.families.entry import Stock
from secateur.families.registry import family_of, twin_of
from secateur.formats.folder import Biases, Folder
from secateur.model.axes import ATTENTION, FEED_FORWARD, Width, alike, axis_kinds, config_keys, model_width
from secateur.model.units.heads import HEADS
from secateur.plan.problem import Plan


class StockFolder(Folder):
    """Folder of the format `stock`: all blocks have the same width."""

    declaration = FORMATS["stock"]
    advice = "use --format hf"

    def format_reason(self, width: Width) -> str | None:
        """Return why the family's class cannot hold blocks of a width."""
        stream, dense, config = self.stream, self.dense(width), self.stream.checkpoint.config
        if len(self.block_range) < len(stream) and width != dense:
            return (
                f"a stock class has one width for all {len(stream)} blocks, and only {self.block_range.start}:"
                f"{self.block_range.stop} are to be pruned; leave the block range out, or use --format hf"
            )
        return stock_unsupported(config, width, dense) or self._earlier_reason() or self._bias_reason()

    def _earlier_reason(self) -> str | None:
        """Return why the family's class cannot hold what an earlier pruning left; None if it can."""
        for index, (block, stock) in enumerate(zip(self.stream.blocks, self.stream.stock.blocks, strict=True)):
            if block.modules != block.modules_left:
                return f"an earlier pruning left block {index} without heads or without channels; use --format hf"
            if any(own.bias != before.bias for own, before in zip(block.modules, stock.modules, strict=True)):
                return f"{self._no_biases()}, and an earlier pruning added one to block {index}; use --format hf"
        return None

    def _bias_reason(self) -> str | None:
        """Return why the family's class cannot hold biases that the recovery adds; None if it adds none."""
        if self.biases and any(m.may_gain_bias and not m.bias for block in self.stream.blocks for m in block.modules):
            return f"{self._no_biases()}, which --recovery bias adds; leave it out, or use --format hf"
        return None

    def _no_biases(self) -> str:
        """Return the beginning of a reason why biases cannot be written."""
        return f"the stock class of {self.stream.checkpoint.config.model_type} has no biases of output projections"

    def unsupported_plan(self, widths: Mapping[int, Width]) -> str | None:
        """Return why blocks at these widths cannot be written: the widths differ, or the class does not support the
        width."""
        if not alike(widths.get(index, block.width) for index, block in enumerate(self.stream.blocks)):
            return "it holds one width for all blocks; use --format hf"
        return super().unsupported_plan(widths)

    def language_config(self, plan: Plan, biases: Biases) -> dict[str, Any]:
        """Return the stock model's config with the new width."""
        stock = self.stream.stock
        return stock_config(stock.raw_config, stock.config, width=model_width(plan.widths.values()), dtype=self.dtype)


def stock_unsupported(config: Any, width: Width, dense: Width) -> str | None:
    """Return why a stock class cannot hold blocks of one width, as a clause that ends in what to do; None if it can.

    Args:
        config: The config object of the dense model.
        width: Width of the blocks that have these axes.
        dense: Their width in the dense model.
    """
    kind, family = config.model_type, family_of(config)
    axes = [axis_kinds()[axis] for axis, number in width.items() if number != dense[axis]]
    narrowed = {axis.role for axis in axes}
    in_config = {name for along in config_keys(family) for name in along}
    if without := next((axis for axis in axes if axis.name not in in_config), None):
        return f"the config of {kind} has no key for the number of {without.label}; take --format hf"
    if min(width.values(), default=1) < 1:
        return "a stock class needs at least one head and one channel; keep one of each, or use --format hf"
    if getattr(config, "use_double_wide_mlp", False) and FEED_FORWARD in narrowed:
        return f"the last blocks of this {kind} are twice as wide as the others; use --format hf"
    if family.derives_channels and FEED_FORWARD in narrowed:
        return f"{kind} derives its feed-forward width from hidden_size; use --format hf"
    return _heads_unsupported(config, width, dense) if ATTENTION in narrowed else None


def _heads_unsupported(config: Any, width: Width, dense: Width) -> str | None:
    """Return why a stock class cannot have fewer heads, as `stock_unsupported` does."""
    kind, family, heads = config.model_type, family_of(config), width.product(HEADS)
    bound = f"so a stock class keeps all {dense.product(HEADS)} heads; prune channels only, or use --format hf"
    twin, stock = twin_of(config), family.entry.stock
    if family.head_counts == "dense" or (twin and twin.derives_head_size):
        return f"{getattr(config, 'twin_of', kind)} derives its head size from hidden_size / heads, {bound}"
    if family.head_counts == "divisors" and config.hidden_size % heads:
        takes = [number for number in range(1, dense.product(HEADS) + 1) if config.hidden_size % number == 0]
        refusal = f"{kind} supports only head counts that divide hidden_size {config.hidden_size}"
        instead = f"keep one of {', '.join(map(str, takes))} heads, or use --format hf"
        if stock.fallback is None:
            return f"{refusal}, not {heads}; {instead}"
        if biases := [key for key in ("attention_bias", "mlp_bias") if getattr(config, key, False)]:
            missing = " or ".join(biases)
            return f"{refusal} and {stock.fallback[0]}, which supports {heads}, has no {missing}; {instead}"
    return None


def stock_config(raw_config: dict[str, Any], config: Any, *, width: Width, dtype: torch.dtype) -> dict[str, Any]:
    """Return the contents of config.json for a model of one width; see `stock_unsupported` for the legal widths.

    Args:
        raw_config: The dense checkpoint's config.json as stored; not changed.
        config: The config object made from it, which holds the settings that the file leaves to defaults.
        width: Number of units along every axis that a block of the model has; the dense one gives the dense model.

    Returns:
        A JSON-ready dictionary, read alike by transformers 4.57 and 5.
    """
    family = family_of(config)
    stock, stored = family.entry.stock, copy.deepcopy(raw_config)
    # transformers' classes need no code of the checkpoint's own, and the files that auto_map names are not copied.
    stored.pop("auto_map", None)
    stored |= own_code(config)
    if family.ungrouped:
        # The class does not read it; other readers might.
        stored.pop("num_key_value_heads", None)
    if family.head_counts == "dense":
        width = Width({axis: number for axis, number in width.items() if axis_kinds()[axis].role != ATTENTION})
    else:
        stored["head_dim"] = head_dim(config)
    stored |= dict(stock.fixed_values)
    for along, (key, *others) in config_keys(family).items():
        if width.keys() >= set(along):
            # Some configs hold the number under two names.
            stored |= dict.fromkeys((key, *(name for name in others if name in stored)), width.product(along))
    stored["tie_word_embeddings"] = bool(getattr(config, "tie_word_embeddings", False))
    stored["dtype"] = stored["torch_dtype"] = str(dtype).removeprefix("torch.")
    stored.update(_rope(stock, config))
    if stock.fallback is not None and config.hidden_size % width.product(HEADS):
        kind, name = stock.fallback
        # Values that config.json leaves to the defaults of the family's class; those of the other class may differ.
        others = CONFIG_MAPPING[kind]().to_dict()
        left_out = {key: value for key, value in config.to_dict().items() if key in others.keys() - stored.keys()}
        stored |= {key: value for key, value in left_out.items() if value != others[key]}
        stored |= {"model_type": kind, "architectures": [name], **dict(stock.fallback_values)}
        # transformers suspects a local Mistral of a version below 5.0 of a tokenizer fault that the checkpoint does not
        # have.
        stored["transformers_version"] = transformers.__version__
    return stored


def _rope(stock: Stock, config: Any) -> dict[str, Any]:
    """Return the rotary settings in both spellings."""
    if stock.theta_key is None or not getattr(config, "rope_parameters", None):
        return {}
    rope = copy.deepcopy(config.rope_parameters)
    keys: dict[str, Any] = {"rope_parameters": rope}
    if "full_attention" in rope:
        if stock.local_theta_key is not None:
            keys[stock.local_theta_key] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    kind = rope.get("rope_type", "default")
    keys[stock.theta_key] = rope["rope_theta"]
    if stock.partial_rotary_key is not None:
        keys[stock.partial_rotary_key] = rope.get("partial_rotary_factor", 1.0)
    # In transformers 5, rope_scaling overrides rope_parameters, so that it must have the same values or be empty.
    elsewhere = {"rope_theta", "partial_rotary_factor", "rope_type", "type"}
    if kind == "longrope":
        # transformers 4.57 reads the original length only beside rope_scaling, and its Phi-3 allows no fourth key in
        # rope_scaling. It then overrides a factor that is not the ratio of the two lengths. Therefore the attention
        # factor that follows from the factor is written as well.
        length = keys["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        elsewhere |= {"original_max_position_embeddings"}
        if (factor := rope.get("factor")) and rope.get("attention_factor") is None:
            rope["attention_factor"] = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(length))
    scaling = {key: value for key, value in rope.items() if key not in elsewhere}
    sections = "mrope_section" in scaling and stock.partial_rotary_key is None
    keys["rope_scaling"] = None if kind == "default" and not sections else {stock.scaling_type_key: kind, **scaling}
    return keys
