"""Quantised weights of a safetensors folder, dequantised to bfloat16 one tensor at a time.

The entry `quantization_config` of config.json names the method. The parts of a weight w are stored under these names:

- fp8: w in float8, and `w_scale_inv`, one factor for each block of w or for all of w.
- mxfp4: `w_blocks`, two 4-bit floats per byte, and `w_scales`, one power of two for 32 values (experts of gpt_oss).
- compressed-tensors: w in float8 or int8, or `w_packed`, several integers in 32 bits; and `w_scale`, one factor for
  a row, a block, a group of entries of a row, or all of w. Integers may have zero points.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.checkpoints.weights import Computed, TensorInfo

METHODS = ("fp8", "mxfp4", "compressed-tensors")
FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "dense")
"""Formats of compressed-tensors that can be read."""
_KEYS = ("quantization_config", "compression_config")
_ACTIVATIONS = ("activation_scale", "input_scale", "output_scale", "k_scale", "v_scale", "q_scale")
"""Endings of names of activation scales, which are not needed to read weights."""
_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
"""Dtypes of weights that are stored one by one, not packed."""
_ENTRIES = 1 << 24
"""Number of entries that are converted to float32 at a time."""


class _Weight(NamedTuple):
    """Quantised weight, with the names of its parts."""

    name: str
    shape: tuple[int, ...]
    parts: dict[str, str]
    """Names of the parts, by the argument of `unpack` that they become; some need not be stored."""
    unpack: Callable[..., Tensor]
    """Function that returns the dequantised weight, from the parts."""

    def reader(self, tensors: dict[str, TensorInfo]) -> Computed:
        """Return the weight as a tensor that is dequantised when it is read."""
        stored = {part: tensors[name] for part, name in self.parts.items() if name in tensors}

        def compute(*values: Tensor) -> Tensor:
            return self.unpack(**dict(zip(stored, values, strict=True)))

        return Computed(self.shape, torch.bfloat16, sources=tuple(stored.values()), compute=compute)


def quantisation(raw: dict[str, Any]) -> dict[str, Any] | None:
    """Return the quantisation settings in config.json; None for weights that are not quantised."""
    found = next((raw[key] for key in _KEYS if raw.get(key)), None)
    return found if found is None or isinstance(found, dict) else {}


def without_quantisation(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of config.json for dequantised weights."""
    return {key: value for key, value in raw.items() if key not in _KEYS}


def quantisation_unsupported(settings: dict[str, Any]) -> str | None:
    """Return why quantised weights cannot be read, as a clause; None if they can."""
    method = settings.get("quant_method", "unknown")
    if method not in METHODS:
        return f"quantised weights ({method}), which cannot be dequantised here; {', '.join(METHODS)} can"
    formats = [settings.get("format"), *(group.get("format") for group in _groups(settings))]
    other = next((kind for kind in formats if kind not in (None, "mixed-precision", *FORMATS)), None)
    if method == "compressed-tensors" and other is not None:
        return f"quantised weights ({method}, {other}), which cannot be dequantised here; {', '.join(FORMATS)} can"
    return None


def dequantised(tensors: dict[str, TensorInfo], settings: dict[str, Any], folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a folder, with weights in place of their quantised parts.

    Args:
        tensors: Stored tensors by name.
        settings: Quantisation settings in config.json, from `quantisation`.

    Raises:
        SecateurError: A weight lacks a part, or its parts do not fit each other.
    """
    weights, used = dict[str, TensorInfo](), set[str]()
    for name, info in tensors.items():
        try:
            found = _weight(name, info, tensors, settings)
        except (KeyError, ValueError) as error:
            wrong = f"lacks {error.args[0]}" if isinstance(error, KeyError) else str(error)
            raise SecateurError(f"{folder}: the quantised weight {name} {wrong}; download it again") from error
        if found is not None:
            weights[found.name] = found.reader(tensors)
            used.update(found.parts.values())
    others = {name: info for name, info in tensors.items() if name not in used and not name.endswith(_ACTIVATIONS)}
    return weights | others


def _groups(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of compressed-tensors for each group of layers."""
    groups = settings.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _weight(name: str, info: TensorInfo, tensors: dict[str, TensorInfo], settings: dict[str, Any]) -> _Weight | None:
    """Return the weight whose main part is a tensor; None if the tensor is not the main part of a quantised weight."""
    if name.endswith("_blocks") and info.dtype == torch.uint8 and len(info.shape) == 4:
        return _four_bit_floats(name, info, tensors)
    if name.endswith("_packed") and info.dtype == torch.int32:
        return _packed_integers(name, info, tensors)
    if info.dtype not in _NARROW or name.endswith("_zero_point"):
        return None
    block_shapes = (
        settings.get("weight_block_size"),
        *((group.get("weights") or {}).get("block_structure") for group in _groups(settings)),
    )
    block = next(filter(None, block_shapes), None)
    scale = f"{name}_scale_inv" if f"{name}_scale_inv" in tensors else f"{name}_scale"
    _check_scales(info.shape, tensors[scale].shape, block)
    parts = {"weight": name, "scale": scale, "zero_point": f"{name}_zero_point"}
    return _Weight(name, info.shape, parts, partial(_scaled, block=block))


def _four_bit_floats(name: str, info: TensorInfo, tensors: dict[str, TensorInfo]) -> _Weight:
    """Return the weight whose main part holds two 4-bit floats in each byte."""
    weight = name.removesuffix("_blocks")
    experts, rows, groups, half = info.shape
    if (scales := tensors[f"{weight}_scales"].shape) != info.shape[:-1]:
        raise ValueError(f"has scales of {list(scales)}")
    parts = {"blocks": name, "scales": f"{weight}_scales"}
    return _Weight(weight, (experts, groups * half * 2, rows), parts, _unpacked_floats)


def _unpacked_floats(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the weight of 4-bit floats and their powers of two."""
    # Imported here because the import takes a second, and few runs need it.
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales)


def _packed_integers(name: str, info: TensorInfo, tensors: dict[str, TensorInfo]) -> _Weight:
    """Return the weight whose main part holds several integers in each 32 bits."""
    weight = name.removesuffix("_packed")
    shape = tuple(tensors[f"{weight}_shape"].read().tolist())
    bits = next((bits for bits in (2, 4, 8) if info.shape == (shape[0], -(-shape[-1] * bits // 32))), None)
    if bits is None or len(shape) != 2:
        raise ValueError(f"is {list(info.shape)} for {list(shape)}, and only 2, 4 and 8 bits can be read")
    _check_scales(shape, tensors[f"{weight}_scale"].shape, None)
    leaves = {"scale": "scale", "zero_point": "zero_point", "group": "g_idx", "shape": "shape"}
    parts = {"words": name} | {part: f"{weight}_{leaf}" for part, leaf in leaves.items()}
    return _Weight(weight, shape, parts, partial(_unpacked_integers, bits=bits))


def _unpacked_integers(
    words: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    group: Tensor | None = None,
    *,
    shape: Tensor,
    bits: int,
) -> Tensor:
    """Return the weight of packed integers.

    Args:
        words: Packed integers (rows x words; int32).
        scale: Factors.
        zero_point: Zero points, packed or not; None for zeros.
        group: Index of each column's group, which has one factor and zero point; None if groups are consecutive.
        shape: Numbers of rows and columns of the weight.
        bits: Number of bits of an integer.
    """
    rows, columns = shape.tolist()
    if zero_point is not None and zero_point.dtype == torch.int32:
        # Zero points are packed along columns, not along rows.
        zero_point = _integers_of(zero_point.T.contiguous(), bits).T[:rows]
    if group is not None and int(group.min()) >= 0:
        scale, zero_point = scale[:, group.long()], None if zero_point is None else zero_point[:, group.long()]
    return _scaled(_integers_of(words, bits)[:, :columns], scale, zero_point)


def _integers_of(words: Tensor, bits: int) -> Tensor:
    """Return the signed integers in words of 32 bits, the lowest bits first (rows x integers; int8)."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = (words[:, :, None] >> shifts) & ((1 << bits) - 1)
    return (values - (1 << (bits - 1))).to(torch.int8).reshape(len(words), -1)


def _check_scales(shape: tuple[int, ...], scales: tuple[int, ...], block: list[int] | None) -> None:
    """Raise `ValueError` if the shape of the factors does not fit the shape of the weight."""
    if prod(scales) == 1 or scales in ((shape[0],), (*shape[:-1], 1)):
        return
    if block is not None and len(scales) == len(shape) > 1:
        expected = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    else:
        groups = scales[-1] if scales and scales[-1] else 1
        expected = (*shape[:-1], groups if shape[-1] % groups == 0 else 0)
    if scales != expected:
        raise ValueError(f"is {list(shape)} and has scales of {list(scales)}")


def _scaled(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, block: list[int] | None = None
) -> Tensor:
    """Return a float8 or int8 weight minus its zero points, times its factors.

    The result is computed in float32 and returned in bfloat16.
    """
    shape, columns = weight.shape, weight.shape[-1]
    # A factor that is a power of two may be stored as its exponent.
    factors = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
    zeros = torch.zeros(1) if zero_point is None else zero_point.float()
    scales, offsets = _Spread(factors, shape, block), _Spread(zeros, shape, block)
    result = torch.empty(shape, dtype=torch.bfloat16)
    stored, dequantised_rows = weight.reshape(-1, columns), result.view(-1, columns)
    step = max(1, _ENTRIES // columns)
    for start in range(0, len(stored), step):
        rows = torch.arange(start, min(start + step, len(stored)))
        dequantised_rows[start : start + step] = (stored[rows].float() - offsets.of(rows)) * scales.of(rows)
    return result


class _Spread:
    """Factors or zero points of a weight: one number for a block, a row, a group of entries of a row, or all of it."""

    def __init__(self, values: Tensor, shape: tuple[int, ...], block: list[int] | None):
        """Find the part of the weight to which each number belongs.

        Args:
            values: The numbers, as stored.
            shape: Shape of the weight.
            block: Rows and columns of a block; None without blocks.
        """
        values = values.reshape(-1, *shape[1:-1], 1) if values.numel() == prod(shape[:-1]) else values
        values = values.reshape((1,) * len(shape)) if values.numel() == 1 else values
        self._rows, self._columns = (1, *shape)[-2:]
        self._value_rows, value_columns = (1, *values.shape)[-2:]
        block_rows, block_columns = block or (1, 1)
        self._rows_each = _entries_each(self._rows, self._value_rows, block_rows)
        self._columns_each = _entries_each(self._columns, value_columns, block_columns)
        self._values = values.reshape(-1, value_columns)

    def of(self, rows: Tensor) -> Tensor:
        """Return the numbers of some rows of the weight (m x columns, m x 1 or 1 x 1).

        Rows are counted over all matrices of the weight.
        """
        if self._values.numel() == 1:
            return self._values
        values = self._values[rows // self._rows * self._value_rows + rows % self._rows // self._rows_each]
        return values if values.shape[1] == 1 else values.repeat_interleave(self._columns_each, 1)[:, : self._columns]


def _entries_each(length: int, count: int, block: int) -> int:
    """Return the number of entries that share one of `count` numbers along a dimension of some length."""
    # The last block may be shorter than the others; rows and groups are complete.
    return block if -(-length // block) == count else -(-length // count)
