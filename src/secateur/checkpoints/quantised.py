"""Quantised weights of a safetensors folder, dequantised to bfloat16 one tensor at a time.

The entry `quantization_config` of config.json names the method. The parts of a weight w are stored under these names:

- fp8: w in float8, and `w_scale_inv`, one factor for each block of w or for all of w.
- mxfp4: `w_blocks`, two 4-bit floats per byte, and `w_scales`, one power of two for 32 values (experts of gpt_oss).
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.checkpoints.weights import Computed, TensorInfo

METHODS = ("fp8", "mxfp4")
_KEYS = ("quantization_config", "compression_config")
_ACTIVATIONS = ("activation_scale", "input_scale", "output_scale", "k_scale", "v_scale", "q_scale")
"""Endings of names of activation scales, which are not needed to read weights."""
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_BLOCK = (128, 128)
"""Rows and columns that are converted to float32 together, if the settings name no block."""


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
    if method in METHODS:
        return None
    return f"quantised weights ({method}), which cannot be dequantised here; {', '.join(METHODS)} can"


def dequantised(tensors: dict[str, TensorInfo], settings: dict[str, Any], folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a folder, with weights in place of their quantised parts.

    Args:
        tensors: Stored tensors by name.
        settings: Quantisation settings in config.json, from `quantisation`.

    Raises:
        SecateurError: A weight lacks its factors, or they do not fit it.
    """
    weights, used = dict[str, TensorInfo](), set[str]()
    shape: tuple[int, ...]
    fitting: list[tuple[int, ...]]
    compute: Callable[..., Tensor]
    for name, info in tensors.items():
        if name.endswith("_blocks") and info.dtype == torch.uint8 and len(info.shape) == 4:
            weight, scales = name.removesuffix("_blocks"), name.removesuffix("_blocks") + "_scales"
            experts, rows, groups, half = info.shape
            shape, fitting, compute = (experts, groups * half * 2, rows), [info.shape[:-1]], _four_bit_floats
        elif info.dtype in _FLOAT8:
            weight, scales, shape, block = name, f"{name}_scale_inv", info.shape, settings.get("weight_block_size")
            fitting = [(), (1,), (1, 1)]
            if block and len(shape) > 1:
                fitting.append(_blocks(shape, block))
            compute = partial(_float8, block=block or _BLOCK)
        else:
            continue
        if scales not in tensors:
            raise _damaged(folder, name, f"lacks {scales}")
        if tensors[scales].shape not in fitting:
            raise _damaged(folder, name, f"is {list(info.shape)} and has scales of {list(tensors[scales].shape)}")
        weights[weight] = Computed(shape, torch.bfloat16, sources=(info, tensors[scales]), compute=compute)
        used |= {name, scales}
    others = {name: info for name, info in tensors.items() if name not in used and not name.endswith(_ACTIVATIONS)}
    return weights | others


def _damaged(folder: Path, name: str, what: str) -> SecateurError:
    return SecateurError(f"{folder}: the quantised weight {name} {what}; download it again")


def _blocks(shape: tuple[int, ...], block: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers of blocks along the axes of a weight; the last blocks may be incomplete."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _four_bit_floats(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the weight of 4-bit floats and their powers of two."""
    # Imported here because the import takes a second, and few runs need it.
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales)


def _float8(weight: Tensor, scale: Tensor, *, block: Sequence[int]) -> Tensor:
    """Return a float8 weight times the factor of each block, computed in float32, in bfloat16.

    Args:
        weight: One matrix, or one for each expert.
        scale: One factor for each block, or for the whole weight. Powers of two may be stored as their exponents.
        block: Rows and columns of a block.
    """
    factors = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
    if factors.numel() == 1:
        factors = factors.reshape(()).expand(_blocks(weight.shape, block))
    result = torch.empty(weight.shape, dtype=torch.bfloat16)
    matrices = (tensor.view(-1, *tensor.shape[-2:]) for tensor in (weight, factors.contiguous(), result))
    for matrix, factors_rc, place in zip(*matrices, strict=True):
        for rows, factors_c, values in zip(matrix.split(block[0]), factors_rc, place.split(block[0]), strict=True):
            values.copy_(rows.float() * factors_c.repeat_interleave(block[1])[: matrix.shape[1]])
    return result
