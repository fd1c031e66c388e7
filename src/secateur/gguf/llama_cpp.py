"""llama.cpp's library, which converts the tensors of a GGUF file to types of its own, such as K-quants."""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType

from secateur.base.errors import SecateurError

LLAMA_TYPES = (
    *("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"),
    *("q4_1", "q5_0", "q5_1", "iq4_nl", "iq4_xs"),
)
"""Types that the library makes, by the names that `--type` takes."""


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


def quantise(source: Path, out: Path, type: str) -> None:
    """Write a GGUF file again with tensors of another type, as llama.cpp's llama-quantize does.

    Tensors whose rows do not fill the type's blocks get a similar type with smaller blocks.

    Args:
        source: File of type f32, f16 or bf16.
        out: The new file.
        type: Name of the type, one of `LLAMA_TYPES`.

    Raises:
        SecateurError: The library is not installed, or it cannot convert the file.
    """
    lib, ffi = library()
    settings = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
    settings.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{type.upper()}")
    settings.nthread = torch.get_num_threads()
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
