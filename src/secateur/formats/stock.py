"""A model of one width throughout, written so that the stock class loads it: what config.json must say.

Config classes differ in how they spell a width and in which head counts they take, and transformers renamed
the rotary settings between 4.57 and 5. The facts are in the families' entries; both spellings are written, so that
either version builds the same model.
"""

import copy
import math
from typing import Any

import torch
import transformers

from secateur.families.entry import Stock
from secateur.families.registry import experts_of, family_of, twin_of
from secateur.model.axes import Width, axis_kinds
from secateur.model.units.experts import EXPERTS


def stock_unsupported(config: Any, width: Width, dense: Width) -> str | None:
    """Why a stock class cannot hold blocks of one width, as a clause that ends in what can be done instead; or None.

    The config object and the dense width are those of the dense model.
    """
    kind, stock = config.model_type, family_of(config).stock
    if min(width.groups, width.per_group, width.fed) < 1:
        return "a stock class needs at least one head and one channel; keep one of each, or take --format hf"
    if getattr(config, "use_double_wide_mlp", False) and width.channels != dense.channels:
        return f"the last blocks of this {kind} are twice as wide as the others; take --format hf"
    if stock.derived and width.channels != dense.channels:
        return f"{kind} derives its feed-forward width from hidden_size; take --format hf"
    if width.heads == dense.heads and width.groups == dense.groups:
        return None
    bound = f"so a stock class keeps all {dense.heads} heads; prune channels only, or take --format hf"
    twin = twin_of(config)
    if stock.heads == "dense" or (twin and twin.derives_head_size):
        return f"{getattr(config, 'twin_of', kind)} derives its head size from hidden_size / heads, {bound}"
    rope = getattr(config, "rope_parameters", None) or {}
    if stock.fused_longrope and rope.get("rope_type") == "longrope":
        return f"{kind} ties its LongRoPE factors to hidden_size / heads, {bound}"
    if stock.heads == "divisors" and config.hidden_size % width.heads:
        takes = [heads for heads in range(1, dense.heads + 1) if config.hidden_size % heads == 0]
        refusal = f"{kind} takes head counts that divide hidden_size {config.hidden_size} only"
        instead = f"keep one of {', '.join(map(str, takes))} heads, or take --format hf"
        if stock.heir is None:
            return f"{refusal}, not {width.heads}; {instead}"
        if biases := [key for key in ("attention_bias", "mlp_bias") if getattr(config, key, False)]:
            lacks = " or ".join(biases)
            return f"{refusal} and {stock.heir[0]}, which takes {width.heads}, has no {lacks}; {instead}"
    return None


def stock_config(
    raw_config: dict[str, Any],
    config: Any,
    *,
    width: Width,
    head_dim: int,
    dtype: torch.dtype,
    channels: int | None = None,
) -> dict[str, Any]:
    """The contents of config.json for a model of one width; see `stock_unsupported` for which widths are legal.

    Args:
        raw_config: the dense checkpoint's config.json as stored; not changed.
        config: the config object made from it, which holds the settings that the file leaves to defaults.
        width: the width of every block; the dense one gives the dense model back.
        head_dim: entries per head.
        channels: of the blocks without experts, in a model that has both; None for as many as they had.

    Returns:
        A JSON-ready dictionary, read alike by transformers 4.57 and 5.
    """
    family = family_of(config)
    stock, stored = family.stock, copy.deepcopy(raw_config)
    # The stock class needs no code of the checkpoint's own, and the files that auto_map names are not copied.
    stored.pop("auto_map", None)
    if family.ungrouped:
        # The class does not read it; other readers might.
        stored.pop("num_key_value_heads", None)
    # A config may speak of experts that no block has.
    if (experts := experts_of(config)) is None or not width.experts:
        stored |= dict.fromkeys((stock.channels, *stock.same), width.channels) | dict(stock.also)
    else:
        if channels is not None:
            stored |= dict.fromkeys((stock.channels, *stock.same), channels)
        # Some configs hold the number under two names.
        names = (*axis_kinds()[EXPERTS].counts, experts.number)
        stored |= {key: width.experts for key in names if key in stored or key == experts.number}
        stored[experts.expert_width] = width.channels
    if stock.heads != "dense":
        stored |= {"num_attention_heads": width.heads, "num_key_value_heads": width.groups, "head_dim": head_dim}
    stored["tie_word_embeddings"] = bool(config.tie_word_embeddings)
    stored["dtype"] = stored["torch_dtype"] = str(dtype).removeprefix("torch.")
    stored.update(_rope(stock, config))
    if stock.heir is not None and config.hidden_size % width.heads:
        kind, name = stock.heir
        stored |= {"model_type": kind, "architectures": [name], **dict(stock.heir_keys)}
        # Below 5.0, a local Mistral is suspected of a tokenizer fault that the checkpoint does not have.
        stored["transformers_version"] = transformers.__version__
    return stored


def _rope(stock: Stock, config: Any) -> dict[str, Any]:
    """The rotary settings in both spellings."""
    if stock.theta is None:
        return {}
    rope = copy.deepcopy(config.rope_parameters)
    keys: dict[str, Any] = {"rope_parameters": rope}
    if "full_attention" in rope:
        if stock.local_theta is not None:
            keys[stock.local_theta] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    kind = rope.get("rope_type", "default")
    keys[stock.theta] = rope["rope_theta"]
    if stock.partial is not None:
        keys[stock.partial] = rope.get("partial_rotary_factor", 1.0)
    # transformers 5 lets rope_scaling win over rope_parameters, so it says the same or nothing at all.
    elsewhere = {"rope_theta", "partial_rotary_factor", "rope_type", "type"}
    if kind == "longrope":
        # 4.57 reads it beside rope_scaling only, and Phi-3's class there allows no fourth key inside. It then
        # overrides a factor that is not the ratio of the two lengths, so what the factor sets is written out.
        length = keys["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        elsewhere |= {"original_max_position_embeddings"}
        if (factor := rope.get("factor")) and rope.get("attention_factor") is None:
            rope["attention_factor"] = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(length))
    scaling = {key: value for key, value in rope.items() if key not in elsewhere}
    sections = "mrope_section" in scaling and stock.partial is None
    keys["rope_scaling"] = None if kind == "default" and not sections else {stock.scaling_type: kind, **scaling}
    return keys
