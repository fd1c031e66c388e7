"""Types of the tensors in a GGUF file."""

import re
from dataclasses import dataclass

import gguf
from gguf import GGMLQuantizationType

from secateur.base.errors import SecateurError


@dataclass(frozen=True)
class Storage:
    """How a type of file stores weights."""

    matrices: GGMLQuantizationType
    ends: GGMLQuantizationType
    """Of the embedding and the output matrix, which suffer most."""
    file: int
    """llama.cpp's number of it."""

    @property
    def multiple(self) -> int:
        """What a row must be a multiple of."""
        return int(gguf.GGML_QUANT_SIZES[self.matrices][0])

    @property
    def bytes(self) -> float:
        """What a weight takes in a matrix."""
        entries, size = gguf.GGML_QUANT_SIZES[self.matrices]
        return float(size / entries)


_T, _F = GGMLQuantizationType, gguf.LlamaFileType

TYPES: dict[str, Storage] = {
    "f32": Storage(_T.F32, _T.F32, _F.ALL_F32),
    "f16": Storage(_T.F16, _T.F16, _F.MOSTLY_F16),
    "bf16": Storage(_T.BF16, _T.BF16, _F.MOSTLY_BF16),
    "q8_0": Storage(_T.Q8_0, _T.Q8_0, _F.MOSTLY_Q8_0),
    "q4_0": Storage(_T.Q4_0, _T.Q8_0, _F.MOSTLY_Q4_0),
}
"""By the name that a person gives."""


def check_type(type: str) -> None:
    """Raise `SecateurError` for a type that cannot be written, with the way to llama.cpp's others."""
    if type in TYPES:
        return
    if type.lower() in TYPES:
        raise SecateurError(f"type is '{type}'; write it {type.lower()}")
    known = ", ".join(TYPES)
    if re.fullmatch(r"i?q\d_.+", type.lower()):
        raise SecateurError(
            f"type {type} is made by llama.cpp's own llama-quantize from a file of type f16 or bf16; its K-quants take "
            f"rows that 256 divides, so prune with --round 256 (types here: {known})"
        )
    raise SecateurError(f"no type {type!r}; choose one of {known}")
