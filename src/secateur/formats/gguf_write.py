"""A GGUF file, written from start to end: metadata, tokenizer and tensors."""

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFReader, GGUFWriter

from secateur.base.progress import Watcher
from secateur.formats.gguf_architecture import Architecture
from secateur.formats.gguf_metadata import add_metadata, model_metadata
from secateur.formats.gguf_model import GgufModel
from secateur.formats.gguf_tensors import FileTensor
from secateur.formats.gguf_tokenizer import Vocabulary, add_vocabulary


def write_gguf(
    path: Path,
    model: GgufModel,
    architecture: Architecture,
    tensors: Sequence[FileTensor],
    vocabulary: Vocabulary,
    *,
    name: str,
    watcher: Watcher,
) -> None:
    """Write a file; one tensor at a time is in memory.

    Args:
        path: The file.
        model: The model to write.
        architecture: Result of `choose_architecture`.
        tensors: Result of `file_tensors`.
        vocabulary: Result of `vocabulary_of`.
        name: Name of the model, for people.
        watcher: Shows the progress.

    Raises:
        SecateurError: A weight is too large for the type.
    """
    writer = GGUFWriter(None, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(vocabulary.safe_name(name))
    writer.add_file_type(model.storage.file)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(len(vocabulary.tokens))
    add_metadata(writer, model_metadata(model, architecture))
    add_vocabulary(writer, vocabulary)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.values.shape, np.dtype(np.float32), tensor.bytes, tensor.type)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in watcher.track(tensors, "Writing"):
            writer.write_tensor_data(tensor.data())
    finally:
        writer.close()


def check_tensors(file: Path, expected: Sequence[FileTensor]) -> str | None:
    """Return the first difference between a file's tensors and the expected ones, as a clause, or None.

    The gguf package's reader opens the file, and reads no weights.
    """
    planned = {tensor.name: (list(tensor.values.shape), tensor.type) for tensor in expected}
    # GGUF lists the fastest axis first.
    found = {tensor.name: ([*map(int, tensor.shape[::-1])], tensor.tensor_type) for tensor in GGUFReader(file).tensors}
    name = next((name for name in {**planned, **found} if planned.get(name) != found.get(name)), None)
    return None if name is None else f"{name} is {found.get(name)}, expected {planned.get(name)}"
