"""A GGUF file as a model to prune: dequantised once into a folder of the user's cache.

transformers reads the file if it can; secateur itself reads the others.
"""

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import cast
from unittest.mock import patch

import gguf
import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from secateur.base.cache import cached_folder
from secateur.base.errors import SecateurError
from secateur.base.quiet import first_line, quiet
from secateur.gguf.config import complete_config
from secateur.gguf.file import architecture_of, reading_of
from secateur.gguf.positions import FACTORS
from secateur.gguf.tokenizer import alone, read_tokenizer
from secateur.gguf.weights import folder_writer

_VERSION = "6"
"""Version of the conversion, part of the cache key; to be raised when the conversion changes."""


def folder_of(file: Path, dtype: torch.dtype) -> Path:
    """Return the folder that holds a GGUF file's model as safetensors; make it at the first call for a file.

    The first call dequantises all weights. It needs memory for the whole model if transformers reads the file, and
    memory for one block if secateur itself reads it.

    Args:
        file: The GGUF file.
        dtype: Dtype of the weights to write.

    Raises:
        SecateurError: The file is broken, one of several parts, or of an architecture that neither transformers nor
            secateur reads; or the cache cannot be written.
    """
    with file.open("rb") as stream:
        start = stream.read(2**20)
    if start[:4] != b"GGUF":
        raise SecateurError(f"{file}: not a GGUF file (it starts with {start[:4]!r}); download it again")
    # The hash differs from file to file, and is computed without reading all of the file.
    stat = file.stat()
    facts = f"{_VERSION}|{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{dtype}"
    key = hashlib.sha256(facts.encode() + start).hexdigest()[:16]
    return cached_folder(f"{file.stem}-{key}", lambda partial: _convert(file, partial, dtype))


def _opened(file: Path) -> GGUFReader:
    """Return the reader of a file's metadata.

    Raises:
        SecateurError: The file is broken or one of several parts.
    """
    try:
        reader = GGUFReader(file)
        architecture_of(reader)
        parts = reader.fields.get("split.count")
        count = int(parts.contents()) if parts is not None else 1
    except Exception as error:
        # The reader maps the file into memory, and fails in many ways when something is missing.
        raise SecateurError(f"{file}: truncated or broken GGUF; download it again") from error
    if count > 1:
        raise SecateurError(f"{file}: one of {count} parts; merge them with llama-gguf-split --merge first")
    return reader


def _convert(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write model and tokenizer into a folder that exists.

    Raises:
        SecateurError: The file cannot be read.
    """
    reader = _opened(file)
    try:
        # Redirection is the only way to hide the progress bar of the dequantisation.
        with quiet(), contextlib.redirect_stderr(io.StringIO()), _read_once(reader):
            reading = reading_of(reader)
            write = _loaded(file, reader, dtype) if reading is None else folder_writer(reader, reading, dtype)
            tokenizer = read_tokenizer(file, reader, read_here=reading is not None)
    except Exception as error:
        reason = (
            f"{error}" if isinstance(error, SecateurError) else f"transformers cannot load it ({first_line(error)})"
        )
        raise SecateurError(f"{file}: {reason}; use the checkpoint that it was made from") from error
    with quiet():
        write(folder)
        tokenizer.save_pretrained(folder)


def _loaded(file: Path, reader: GGUFReader, dtype: torch.dtype) -> Callable[[Path], None]:
    """Let transformers read a whole file, and return a function that writes the model into a folder.

    Raises:
        SecateurError: transformers does not read all of the file. Without the first check, it would fail late or with
            a long traceback.
    """
    architecture = architecture_of(reader)
    # transformers' list spells some names with an underscore where files have a hyphen.
    if architecture.replace("-", "_") not in {name.replace("-", "_") for name in GGUF_SUPPORTED_ARCHITECTURES}:
        raise SecateurError(f"transformers cannot read the architecture {architecture!r} from GGUF")
    with alone(file) as folder:
        config = AutoConfig.from_pretrained(folder, gguf_file=file.name)
        complete_config(config, reader)
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, config=config, dtype=dtype, output_loading_info=True
        )
    if missing := found["missing_keys"]:
        # transformers has filled these parameters with random numbers.
        raise SecateurError(f"transformers cannot find {min(missing)} in it")
    stored = sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name not in FACTORS)
    read = sum(parameter.numel() for parameter in model.parameters())
    if stored != read:
        biased = any(tensor.name.endswith(".bias") for tensor in reader.tensors)
        raise SecateurError(
            f"transformers reads only {read:,} of its {stored:,} weights" + (", without the biases" if biased else "")
        )
    # The weights are no longer quantised, and transformers would refuse to save a model that claims otherwise.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    return cast(Callable[[Path], None], model.save_pretrained)


@contextlib.contextmanager
def _read_once(reader: GGUFReader) -> Iterator[None]:
    """Let transformers open the file once instead of three times, and make the table of tensor names once instead of
    once for each tensor. This saves most of its time."""
    names = cache(gguf.get_tensor_name_map)
    with patch.object(gguf, "GGUFReader", lambda _: reader), patch.object(gguf, "get_tensor_name_map", names):
        yield
