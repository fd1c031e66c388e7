"""Names, order and values of tensors in GGUF files, for files that are written and read.

A `Change` turns one tensor of a checkpoint into one tensor of the file, a `Split` turns it into two. Each knows its
inverse, so that writing and reading cannot disagree.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import gguf
import torch
from torch import Tensor

from secateur.checkpoints.facts import head_dim
from secateur.families.registry import family_of, gguf_of
from secateur.gguf.architecture import Architecture

_SPELLINGS = {
    "correction_bias": "correction.bias",
    ".sinks": ".sinks.weight",
    ".expert_bias": ".expert_bias.bias",
    ".dt_bias": ".dt_proj.bias",
    "layer_scalar": "layer_scalar.weight",
}
"""Parts of transformers' names of tensors, with their spelling in the gguf package's table."""
_UNLISTED = {
    r".*\.(\d+)\.router\.scale": r"blk.\1.ffn_gate_inp.scale",
    r".*\.(\d+)\.router\.per_expert_scale": r"blk.\1.ffn_down_exps.scale",
}
"""Patterns of transformers' names that the gguf package does not list (Gemma 4), with llama.cpp's names."""


def gguf_name(architecture: str, blocks: int, name: str) -> str | None:
    """Return llama.cpp's name of a tensor; None if the architecture has no place for it.

    Args:
        architecture: llama.cpp's name of the architecture.
        blocks: Number of blocks of the model.
        name: transformers' name of the tensor in the whole model.
    """
    for pattern, unlisted in _UNLISTED.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(unlisted)
    for part, spelling in _SPELLINGS.items():
        name = name.replace(part, spelling)
    # The table lists Bloom's tensors without the name of the model.
    names = (name, name.removeprefix("transformer."))
    found = (_table(architecture, blocks).get_name(one, (".weight", ".bias")) for one in names)
    return next(filter(None, found), None)


@cache
def _table(architecture: str, blocks: int) -> Any:
    """Return the gguf package's table from transformers' names to llama.cpp's."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, blocks)


@dataclass(frozen=True)
class Change:
    """Difference between a checkpoint's tensor and the file's, in both directions."""

    write: Callable[[Tensor], Tensor]
    """Function that returns the file's tensor, from the checkpoint's."""
    read: Callable[[Tensor], Tensor]
    """Function that returns the checkpoint's tensor, from the file's in float32."""


@dataclass(frozen=True)
class Split:
    """Pair of tensors in a file that hold one tensor of a checkpoint."""

    names: tuple[str, str]
    """llama.cpp's names, inside a block."""
    write: Callable[[Tensor, Any], tuple[Tensor, Tensor]]
    """Function that returns the pair, from the checkpoint's tensor and the config."""
    read: Callable[[Tensor, Tensor, Any], Tensor]
    """Function that returns the checkpoint's tensor, from the pair and the config."""

    def part(self, number: int, config: Any) -> Callable[[Tensor], Tensor]:
        """Return the function that takes the first (0) or second (1) tensor out of the checkpoint's."""
        return lambda rows: self.write(rows, config)[number]


def changes_of(name: str, stored: str, config: Any, architecture: Architecture) -> list[Change]:
    """Return the changes of one tensor, in the order in which they are made when a file is written.

    Args:
        name: transformers' name of the tensor, or the end of this name.
        stored: llama.cpp's name of the tensor, or the end of this name.
        config: The config object.
        architecture: The architecture of the file.
    """
    leaf = name.partition("linear_attn.")[2]
    # In these files, neighbouring entries of a head rotate together, and in these checkpoints, others.
    permuted = architecture.interleaved_rope and not gguf_of(config).interleaved_rope
    # Linear attention's own norm is stored without an offset.
    holds_gain = stored.endswith("_norm.weight") and not stored.endswith("ssm_norm.weight")
    rules = (
        (_interleaving(config), permuted and re.search(r"\battn_[qk]\.", stored)),
        (_PLUS_ONE, family_of(config).norm_offset and holds_gain),
        (_DECAY, leaf == "A_log"),
        (_tiling(config, leaf), architecture.linear == "tiled"),
        (_ONE_CHANNEL, stored.endswith(("conv.weight", "conv1d.weight"))),
    )
    return [change for change, applies in rules if applies and change]


def split_of(name: str) -> Split | None:
    """Return how a file splits a tensor of a checkpoint, by transformers' name; None if it does not."""
    return _SPLITS.get(".".join(name.split(".")[-2:]))


_PLUS_ONE = Change(lambda gain: gain.float() + 1, lambda gain: gain - 1)
_DECAY = Change(lambda log: -log.float().exp(), lambda decay: (-decay).log())
"""Decay of linear attention. Checkpoints store its logarithm, `A_log`."""
_ONE_CHANNEL = Change(partial(torch.squeeze, dim=1), partial(torch.unsqueeze, dim=1))
"""Kernel of a depthwise convolution (channels x 1 x positions). Files leave out the dimension of size 1."""


def _interleaving(config: Any) -> Change:
    """Return the change of the order of rows in query and key layers.

    In checkpoints, entry i of a head rotates together with entry i + head_dim / 2; in these files, with the next entry.
    """

    def write(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, 2, head_dim(config) // 2)).transpose(1, 2).reshape(rows.shape)

    def read(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, head_dim(config) // 2, 2)).transpose(1, 2).reshape(rows.shape)

    return Change(write, read)


_VALUE_AXES = {
    **dict.fromkeys(("in_proj_qkv.weight", "conv1d.weight"), (0, True)),
    **dict.fromkeys(("in_proj_z.weight", "in_proj_b.weight", "in_proj_a.weight", "A_log", "dt_bias"), (0, False)),
    "out_proj.weight": (1, False),
}
"""Tensors of linear attention with a dimension of value heads: which dimension, and whether rows of queries and keys
come before the value heads."""


def _tiling(config: Any, leaf: str) -> Change | None:
    """Return the change from the order `grouped` to `tiled`; None for a tensor without value heads."""
    if leaf not in _VALUE_AXES:
        return None
    axis, follows = _VALUE_AXES[leaf]
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    start = 2 * keys * config.linear_key_head_dim * follows
    sizes = keys, values // keys
    write, read = (partial(_transposed, axis=axis, start=start, sizes=own) for own in (sizes, sizes[::-1]))
    return Change(write, read)


def _transposed(tensor: Tensor, axis: int, start: int, sizes: tuple[int, int]) -> Tensor:
    """Transpose heads as if they were the entries of a matrix of these sizes; the heads begin at `start` along the
    axis."""
    first, heads = tensor.tensor_split([start], dim=axis)
    matrix = heads.unflatten(axis, (*sizes, -1)).transpose(axis, axis + 1)
    return torch.cat((first, matrix.flatten(axis, axis + 2)), axis)


def _latent_matrices(rows: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Return the matrix that computes keys from the latent vector, and the one that computes values. In checkpoints
    they are one layer, whose rows are ordered by head.

    llama.cpp multiplies queries by the matrix of keys, so this matrix is transposed: heads x latent entries x key
    entries. The matrix of values is heads x value entries x latent entries.
    """
    heads = rows.unflatten(0, (-1, config.qk_nope_head_dim + config.v_head_dim))
    return heads[:, : config.qk_nope_head_dim].transpose(1, 2), heads[:, config.qk_nope_head_dim :]


def _latent_rows(keys: Tensor, values: Tensor, _: Any) -> Tensor:
    """Return the rows of the layer that computes keys and values from the latent vector."""
    return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)


def _by_kind(rows: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Return the rows of all queries, then keys, then values; and the rows of all gates.

    A checkpoint of Qwen3-Next holds the rows of each key head together.
    """
    kinds = rows.unflatten(0, (config.linear_num_key_heads, -1)).split(_rows_of_key_head(config), dim=1)
    queries, keys, values, gates = (kind.flatten(0, 1) for kind in kinds)
    return torch.cat([queries, keys, values]), gates


def _by_key_head(rows: Tensor, gates: Tensor, config: Any) -> Tensor:
    """Return the rows in the order of a checkpoint of Qwen3-Next: all rows of a key head together."""
    heads = config.linear_num_key_heads
    kinds = torch.cat((rows, gates)).split([heads * size for size in _rows_of_key_head(config)])
    return torch.cat([kind.unflatten(0, (heads, -1)) for kind in kinds], dim=1).flatten(0, 1)


def _rows_of_key_head(config: Any) -> tuple[int, int, int, int]:
    """Return the numbers of rows of queries, keys, values and gates that belong to one key head."""
    values = config.linear_num_value_heads // config.linear_num_key_heads * config.linear_value_head_dim
    return (config.linear_key_head_dim,) * 2 + (values,) * 2


_SPLITS: Mapping[str, Split] = {
    "kv_b_proj.weight": Split(("attn_k_b.weight", "attn_v_b.weight"), _latent_matrices, _latent_rows),
    "in_proj_qkvz.weight": Split(("attn_qkv.weight", "attn_gate.weight"), _by_kind, _by_key_head),
}
"""Splits by the last two parts of transformers' names."""
