"""Types of the numbers in a GGUF file, by the names that `--type` takes."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from secateur.base.errors import SecateurError
from secateur.formats.llama_cpp import LLAMA_TYPES, quantised_rows

AS_INPUT = "as-input"
"""Value of `--type` for the types that the tensors had in the GGUF file that was pruned."""


@dataclass(frozen=True)
class Storage:
    """Types of the tensors in a file of one type."""

    matrices: GGMLQuantizationType
    """Type of most matrices."""
    embeddings: GGMLQuantizationType
    """Type of the embedding and of the output matrix, whose rounding increases the loss most."""
    file: int
    """llama.cpp's number of the file's type."""

    @property
    def block(self) -> int:
        """Number of weights in one block of the type, by which the length of rows must be divisible."""
        return int(gguf.GGML_QUANT_SIZES[self.matrices][0])

    @property
    def bytes(self) -> float:
        """Bytes per weight of a matrix."""
        weights, size = gguf.GGML_QUANT_SIZES[self.matrices]
        return float(size / weights)

    def type_of(self, name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
        """Return the type of one tensor: vectors stay float32, and matrices whose rows do not fill blocks become
        float16.

        Args:
            name: llama.cpp's name.
            shape: Shape of the tensor.
        """
        inside = name.split(".", 2)[2] if name.startswith("blk.") else name
        if len(shape) == 1 or inside in _EXACT or name.endswith("_norm.weight"):
            return GGMLQuantizationType.F32
        if shape[-1] % self.block:
            return GGMLQuantizationType.F16
        return self.embeddings if name in _EMBEDDINGS else self.matrices

    def types_in(self, index: int) -> tuple[str, ...]:
        """Return the types in a block, if blocks with the same shapes may have different ones; here they may not."""
        return ()

    def data(self, name: str, values: np.ndarray[Any, Any], type: GGMLQuantizationType) -> np.ndarray[Any, Any]:
        """Return the bytes of a tensor in its type.

        Args:
            name: llama.cpp's name.
            values: The weights, float32 and contiguous.
            type: Result of `type_of`.

        Raises:
            SecateurError: A weight is too large for the type.
        """
        with np.errstate(over="ignore"):
            data = quantised_rows(values, type)
        if type == GGMLQuantizationType.F16 and not np.isfinite(data).all():
            raise SecateurError(f"tensor {name} has weights that are too large for f16; use bf16 or f32")
        return data


_EXACT = frozenset({"position_embd.weight", "ffn_gate_inp.weight", "shortconv.conv.weight", "ssm_conv1d.weight"})
"""Matrices that stay float32."""
_EMBEDDINGS = frozenset({"token_embd.weight", "per_layer_token_embd.weight", "output.weight"})
_T, _F = GGMLQuantizationType, gguf.LlamaFileType

TYPES: dict[str, Storage] = {
    "f32": Storage(_T.F32, _T.F32, _F.ALL_F32),
    "f16": Storage(_T.F16, _T.F16, _F.MOSTLY_F16),
    "bf16": Storage(_T.BF16, _T.BF16, _F.MOSTLY_BF16),
    "q8_0": Storage(_T.Q8_0, _T.Q8_0, _F.MOSTLY_Q8_0),
    "q4_0": Storage(_T.Q4_0, _T.Q8_0, _F.MOSTLY_Q4_0),
}
"""Types that can be written for every model, by name."""


def check_type(type: str, known: Collection[str] = (*TYPES, *LLAMA_TYPES, AS_INPUT)) -> None:
    """Raise `SecateurError` for a type that cannot be written.

    Args:
        type: Value of `--type`.
        known: Types that the command writes.
    """
    if type in known:
        return
    if type.lower() in known:
        raise SecateurError(f"type is '{type}'; write it {type.lower()}")
    if type.lower() in LLAMA_TYPES:
        raise SecateurError(f"type {type} is only for secateur export: prune to a folder, then export that")
    raise SecateurError(f"no type {type!r}; choose one of {', '.join(known)}")
