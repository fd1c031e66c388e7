"""Quantised weights of a safetensors folder, dequantised to bfloat16 one tensor at a time.

The entry `quantization_config` of config.json names the method. The parts of a weight w have these names:

- fp8: w in float8, and `w_scale_inv`, one factor for each block of w or for all of w.
- mxfp4: `w_blocks`, two 4-bit floats per byte, and `w_scales`, one power of two for 32 values (experts of gpt_oss).
- compressed-tensors: w in float8 or int8, or `w_packed`, several integers in 32 bits; and `w_scale`, one factor for
  a row, a block, a group of entries of a row, or all of w. Integers may have zero points.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.model.weights import TensorInfo, read_tensor

METHODS = ("fp8", "mxfp4", "compressed-tensors")
FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "dense")
"""Formats of compressed-tensors that can be read."""
_KEYS = ("quantization_config", "compression_config")
_ACTIVATIONS = ("activation_scale", "input_scale", "output_scale", "k_scale", "v_scale", "q_scale")
"""Endings of names of activation scales, which are not needed to read weights."""
_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_ENTRIES = 1 << 24
"""Number of entries that are converted to float32 at a time."""


@dataclass(frozen=True)
class Packed(TensorInfo):
    """Quantised weight; `file` and `offset` locate its main part."""

    stored: tuple[TensorInfo, ...]
    """Stored tensors of all its parts, the main part first."""
    unpack: Callable[..., Tensor]

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """Stored tensors that must be read."""
        return self.stored

    def read(self) -> Tensor:
        """Return the dequantised weight in CPU memory."""
        return self.unpack(*map(read_tensor, self.stored))


class _Found(NamedTuple):
    """Weight with the names of its parts."""

    name: str
    shape: tuple[int, ...]
    parts: list[str]
    unpack: Callable[..., Tensor]


def quantisation(raw: dict[str, Any]) -> dict[str, Any] | None:
    """Return the quantisation settings in config.json; None for weights that are not quantised."""
    found = next((raw[key] for key in _KEYS if raw.get(key)), None)
    return found if found is None or isinstance(found, dict) else {}


def without_quantisation(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of config.json for dequantised weights."""
    return {key: value for key, value in raw.items() if key not in _KEYS}


def quantisation_unsupported(how: dict[str, Any]) -> str | None:
    """Return why quantised weights cannot be read, as a clause; None if they can."""
    method = how.get("quant_method", "unknown")
    if method not in METHODS:
        return f"quantised weights ({method}), which cannot be dequantised here; {', '.join(METHODS)} can"
    formats = [how.get("format"), *(group.get("format") for group in _groups(how))]
    other = next((kind for kind in formats if kind not in (None, "mixed-precision", *FORMATS)), None)
    if method == "compressed-tensors" and other is not None:
        return f"quantised weights ({method}, {other}), which cannot be dequantised here; {', '.join(FORMATS)} can"
    return None


def dequantised(tensors: dict[str, TensorInfo], how: dict[str, Any], folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a folder, with weights in place of their quantised parts.

    Args:
        tensors: as stored, by name.
        how: what config.json says of them; see `quantisation_unsupported`.

    Raises:
        SecateurError: a weight lacks a part, or its parts do not fit each other.
    """
    weights, used = dict[str, TensorInfo](), set[str]()
    for name, info in tensors.items():
        try:
            found = _weight(name, info, tensors, how)
        except (KeyError, ValueError) as error:
            wrong = f"lacks {error.args[0]}" if isinstance(error, KeyError) else str(error)
            raise SecateurError(f"{folder}: the quantised weight {name} {wrong}; download it again") from error
        if found is not None:
            parts = tuple(tensors[part] for part in found.parts)
            weights[found.name] = Packed(info.file, found.shape, torch.bfloat16, info.offset, parts, found.unpack)
            used.update(found.parts)
    others = {name: info for name, info in tensors.items() if name not in used and not name.endswith(_ACTIVATIONS)}
    return weights | others


def _groups(how: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of compressed-tensors for each group of layers."""
    groups = how.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _weight(name: str, info: TensorInfo, tensors: dict[str, TensorInfo], how: dict[str, Any]) -> _Found | None:
    """Return the weight whose main part is a tensor."""
    if name.endswith("_blocks") and info.dtype == torch.uint8 and len(info.shape) == 4:
        place = name.removesuffix("_blocks")
        experts, rows, groups, half = info.shape
        if (scales := tensors[f"{place}_scales"].shape) != info.shape[:-1]:
            raise ValueError(f"has scales of {list(scales)}")
        shape = (experts, groups * half * 2, rows)
        return _Found(place, shape, [name, f"{place}_scales"], _halves)
    if name.endswith("_packed") and info.dtype == torch.int32:
        return _integers(name, info, tensors)
    if info.dtype not in _NARROW or name.endswith("_zero_point"):
        return None
    block = how.get("weight_block_size")
    for group in _groups(how):
        block = block or (group.get("weights") or {}).get("block_structure")
    scale = f"{name}_scale_inv" if f"{name}_scale_inv" in tensors else f"{name}_scale"
    zero = f"{name}_zero_point"
    _check(info.shape, tensors[scale].shape, block)
    return _Found(name, info.shape, [name, scale, *([zero] * (zero in tensors))], partial(_scaled, block=block))


def _halves(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the weight of 4-bit floats and their powers of two."""
    # A second of imports, which most runs do without.
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales)


def _integers(name: str, info: TensorInfo, tensors: dict[str, TensorInfo]) -> _Found:
    """Return the weight of integers that are packed into 32 bits."""
    place = name.removesuffix("_packed")
    shape = tuple(read_tensor(tensors[f"{place}_shape"]).tolist())
    bits = next((bits for bits in (2, 4, 8) if info.shape == (shape[0], -(-shape[-1] * bits // 32))), None)
    if bits is None or len(shape) != 2:
        raise ValueError(f"is {list(info.shape)} for {list(shape)}, and only 2, 4 and 8 bits can be read")
    scale, zero, order = f"{place}_scale", f"{place}_zero_point", f"{place}_g_idx"
    _check(shape, tensors[scale].shape, None)
    others = [part for part in (zero, order) if part in tensors]

    def unpack(words: Tensor, scales: Tensor, *rest: Tensor) -> Tensor:
        beside = dict(zip(others, rest, strict=True))
        zeros, group = beside.get(zero), beside.get(order)
        if zeros is not None and zeros.dtype == torch.int32:
            # The zero points of a column lie below each other.
            zeros = _apart(zeros.T.contiguous(), bits).T[: shape[0]]
        if group is not None and int(group.min()) >= 0:
            scales, zeros = scales[:, group.long()], None if zeros is None else zeros[:, group.long()]
        return _scaled(_apart(words, bits)[:, : shape[1]], scales, zeros)

    return _Found(place, shape, [name, scale, *others, f"{place}_shape"], lambda *parts: unpack(*parts[:-1]))


def _apart(words: Tensor, bits: int) -> Tensor:
    """Return signed integers unpacked from words of 32 bits, the lowest bits first (rows x words; int8)."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = (words[:, :, None] >> shifts) & ((1 << bits) - 1)
    return (values - (1 << (bits - 1))).to(torch.int8).reshape(len(words), -1)


def _check(shape: tuple[int, ...], scales: tuple[int, ...], block: list[int] | None) -> None:
    """Raise `SecateurError` for factors that do not fit a weight."""
    if prod(scales) == 1 or scales in ((shape[0],), (*shape[:-1], 1)):
        return
    if block is not None and len(scales) == len(shape) > 1:
        wanted = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    else:
        groups = scales[-1] if scales and scales[-1] else 1
        wanted = (*shape[:-1], groups if shape[-1] % groups == 0 else 0)
    if scales != wanted:
        raise ValueError(f"is {list(shape)} and has scales of {list(scales)}")


def _scaled(weight: Tensor, scale: Tensor, zero: Tensor | None = None, *, block: list[int] | None = None) -> Tensor:
    """Return a float8 or int8 weight minus its zero points, times its factors: computed in float32, returned in
    bfloat16."""
    shape, columns = weight.shape, weight.shape[-1]
    # A factor that is a power of two may be stored as its exponent.
    factors = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
    scales, zeros = _Spread(factors, shape, block), None if zero is None else _Spread(zero.float(), shape, block)
    result = torch.empty(shape, dtype=torch.bfloat16)
    flat, whole = weight.reshape(-1, columns), result.view(-1, columns)
    step = max(1, _ENTRIES // columns)
    for start in range(0, len(flat), step):
        rows = torch.arange(start, min(start + step, len(flat)))
        values = flat[rows].float()
        whole[start : start + step] = (values if zeros is None else values - zeros.of(rows)) * scales.of(rows)
    return result


class _Spread:
    """Scales or zero points of a weight: one for a block, a row, a part of a row, or all of it."""

    def __init__(self, values: Tensor, shape: tuple[int, ...], block: list[int] | None):
        values = values.reshape(-1, *shape[1:-1], 1) if values.numel() == prod(shape[:-1]) else values
        values = values.reshape((1,) * len(shape)) if values.numel() == 1 else values
        self.high, self.columns = (shape[-2] if len(shape) > 1 else 1), shape[-1]
        self.down, self.along = (values.shape[-2] if len(shape) > 1 else 1), values.shape[-1]
        tall, wide = block if block is not None else (1, 1)
        # Blocks at the end may be cut short; rows and groups are whole.
        self.tall = tall if -(-self.high // tall) == self.down else -(-self.high // self.down)
        self.wide = wide if -(-self.columns // wide) == self.along else -(-self.columns // self.along)
        self.flat = values.reshape(-1, self.along)

    def of(self, rows: Tensor) -> Tensor:
        """Return the numbers of some rows of the weight (m x columns, or m x 1); rows are counted over all matrices."""
        if self.flat.numel() == 1:
            return self.flat
        own = self.flat[rows // self.high * self.down + rows % self.high // self.tall]
        return own if self.along == 1 else own.repeat_interleave(self.wide, 1)[:, : self.columns]
