"""llama.cpp's library, which converts the tensors of a GGUF file to types of its own, such as K-quants."""

import ctypes
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from secateur.base.errors import SecateurError

_T = GGMLQuantizationType
_NAMES = {
    _T.Q2_K: "q2_k q2_k_s",
    _T.Q3_K: "q3_k_s q3_k_m q3_k_l",
    _T.Q4_K: "q4_k_s q4_k_m",
    _T.Q5_K: "q5_k_s q5_k_m",
    _T.IQ3_S: "iq3_xs iq3_s iq3_m",
    _T.IQ2_S: "iq2_m",
    _T.IQ2_XS: "iq2_xs iq2_s",
}
_ALONE = (_T.Q6_K, _T.Q4_1, _T.Q5_0, _T.Q5_1, _T.IQ4_NL, _T.IQ4_XS, _T.IQ3_XXS, _T.IQ2_XXS, _T.IQ1_M, _T.IQ1_S)
LLAMA_TYPES = {name: type for type, names in _NAMES.items() for name in names.split()}
LLAMA_TYPES |= {type.name.lower(): type for type in _ALONE}
"""Types that the library makes, by the names that `--type` takes, with the type of most matrices."""
NEEDING_IMPORTANCE = frozenset({"q2_k_s", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs"})
"""Types that the library makes only with importances."""


@cache
def library() -> tuple[Any, Any]:
    """Return the library, without output on standard error, and the foreign function interface that calls it.

    Raises:
        SecateurError: The package of the library is not installed.
    """
    try:
        from llama_cpp_py_sync import _cffi_bindings as bindings
    except ImportError as error:
        raise SecateurError("llama.cpp's library is not installed; pip install 'secateur[llama]'") from error
    lib, ffi = bindings.get_lib(), bindings.get_ffi()
    lib.llama_log_set(_silence(ffi), ffi.NULL)
    lib.llama_backend_init()
    return lib, ffi


@cache
def _silence(ffi: Any) -> Any:
    """Return a log function that prints nothing. The cache keeps it alive, because the library goes on calling it."""
    return ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda *_: None)


def quantise(source: Path, out: Path, type: str, importance: Mapping[str, Tensor] | None = None) -> None:
    """Write a GGUF file again with tensors of another type, as llama.cpp's llama-quantize does.

    Tensors whose rows do not fill the type's blocks get a similar type with smaller blocks.

    Args:
        source: File of type f32, f16 or bf16.
        out: The new file.
        type: Name of the type, one of `LLAMA_TYPES`.
        importance: Importances of the columns of matrices, by name; None for equal ones.

    Raises:
        SecateurError: The library is not installed, or it cannot convert the file.
    """
    lib, ffi = library()
    settings = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
    settings.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{type.upper()}")
    settings.nthread = torch.get_num_threads()
    # The library reads the entries until it finds one without a name. `kept` keeps their memory.
    entries, kept = ffi.new("struct llama_model_imatrix_data[]", len(importance or {}) + 1), list[Any]()
    for entry, (name, values) in zip(entries, (importance or {}).items(), strict=False):
        kept += (own_name := ffi.new("char[]", name.encode())), (numbers := values.float().contiguous().numpy())
        entry.name, entry.size = own_name, numbers.size
        entry.data = ffi.cast("const float *", numbers.ctypes.data)
    settings.imatrix = entries if importance else ffi.NULL
    if lib.llama_model_quantize(str(source).encode(), str(out).encode(), settings):
        raise SecateurError(f"{out}: llama.cpp cannot convert the model to {type}; use another --type")


def quantised_rows(values: np.ndarray[Any, Any], type: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """Return the bytes of a tensor in a type, made by the gguf package if it can, or else by llama.cpp's library.

    Args:
        values: The weights, float32 and contiguous; each row must fill the type's blocks.
        type: The type.

    Raises:
        SecateurError: Neither of the two can make the type.
    """
    try:
        return gguf.quants.quantize(values, type)
    except NotImplementedError:
        pass
    tensors = _tensor_library()
    if tensors.ggml_quantize_requires_imatrix(int(type)):
        raise SecateurError("the type needs an importance matrix, which secateur does not have; use another --type")
    rows = values.reshape(-1, values.shape[-1])
    out = np.empty((len(rows), int(gguf.quant_shape_to_byte_shape(rows.shape, type)[-1])), np.uint8)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (rows, out))
    tensors.ggml_quantize_chunk(int(type), *pointers, *map(ctypes.c_int64, (0, *rows.shape)), None)
    return out.reshape(*values.shape[:-1], -1)


@cache
def check_quantises(type: GGMLQuantizationType) -> None:
    """Raise `SecateurError` for a type that `quantised_rows` cannot make; the message does not name the type."""
    quantised_rows(np.zeros((1, gguf.GGML_QUANT_SIZES[type][0]), np.float32), type)


@cache
def _tensor_library() -> ctypes.CDLL:
    """Return the part of llama.cpp's library that computes with tensors.

    Raises:
        SecateurError: The package of the library is not installed.
    """
    library()
    found = find_spec("llama_cpp_py_sync")
    assert found is not None
    folder = Path(str(found.origin)).parent
    tensors = ctypes.CDLL(str(next(file for file in sorted(folder.iterdir()) if "ggml-base" in file.name)))
    tensors.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    return tensors
