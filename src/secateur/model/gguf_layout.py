"""What llama.cpp's files lay out otherwise than checkpoints, both ways: norms that add one, linear attention, scales.

What is written is undone by what stands beside it here when a file is read.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

SCALES = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}
"""What Gemma 4 calls some tensors inside a block → what llama.cpp does; the gguf package does not know them."""
STILL = 1e30
"""A frequency divided by it turns nothing."""


def adds_one(name: str) -> bool:
    """Whether a tensor of a file holds the factors of a norm, where checkpoints have them less one."""
    # Linear attention's own norm is behind it, and stored as it is.
    return name.endswith("_norm.weight") and not name.endswith("ssm_norm.weight")


def decays(stored: Tensor) -> Tensor:
    """What a file holds of `A_log`."""
    return -stored.float().exp()


def decays_back(found: Tensor) -> Tensor:
    """`A_log` of what a file holds."""
    return (-found).log()


_OF_VALUES = {
    **dict.fromkeys(("in_proj_qkv.weight", "conv1d.weight"), (0, True)),
    **dict.fromkeys(("in_proj_z.weight", "in_proj_b.weight", "in_proj_a.weight", "A_log", "dt_bias"), (0, False)),
    "out_proj.weight": (1, False),
}
"""What belongs to the value heads of linear attention: along which axis, and whether queries and keys come first."""


def tiled(config: Any, *, back: bool = False) -> dict[str, Callable[[Tensor], Tensor]]:
    """How tensors of linear attention are reordered for `qwen35`, or back, by what checkpoints call them.

    Checkpoints hold value heads group by group; those files the first of all groups, then the second ones.
    """
    groups, ahead = config.linear_num_key_heads, 2 * config.linear_num_key_heads * config.linear_key_head_dim
    sizes = groups, config.linear_num_value_heads // groups
    return {
        leaf: partial(_turned, axis=axis, ahead=ahead if behind else 0, sizes=sizes[::-1] if back else sizes)
        for leaf, (axis, behind) in _OF_VALUES.items()
    }


def _turned(tensor: Tensor, axis: int, ahead: int, sizes: tuple[int, int]) -> Tensor:
    """Heads along an axis, which are so many times so many: the first of each run, then the second ones, and so on."""
    first, heads = tensor.tensor_split([ahead], dim=axis)
    apart = heads.unflatten(axis, (*sizes, -1)).transpose(axis, axis + 1)
    return torch.cat((first, apart.flatten(axis, axis + 2)), axis)


def by_kind(fused: Tensor, config: Any, which: slice) -> Tensor:
    """Rows of some of queries, keys, values and gates, one kind after the other, where a checkpoint of Qwen3-Next holds
    those of each key head together."""
    kinds = fused.unflatten(0, (config.linear_num_key_heads, -1)).split(_sizes(config), dim=1)
    return torch.cat([kind.flatten(0, 1) for kind in kinds[which]])


def by_key(qkv: Tensor, gates: Tensor, config: Any) -> Tensor:
    """The rows of each key head together, of what `by_kind` gives."""
    heads = config.linear_num_key_heads
    kinds = torch.cat((qkv, gates)).split([heads * size for size in _sizes(config)])
    return torch.cat([kind.unflatten(0, (heads, -1)) for kind in kinds], dim=1).flatten(0, 1)


def _sizes(config: Any) -> tuple[int, int, int, int]:
    """Rows that a key head has of queries, keys, values and gates."""
    values = config.linear_num_value_heads // config.linear_num_key_heads * config.linear_value_head_dim
    return (config.linear_key_head_dim,) * 2 + (values,) * 2
