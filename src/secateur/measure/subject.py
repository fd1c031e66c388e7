"""A model to measure: opened, but not loaded. transformers runs it, or llama.cpp if it is a GGUF file that transformers
cannot read."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
from gguf import GGUFReader

from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.progress import Silent, Watcher
from secateur.base.quiet import quiet
from secateur.checkpoints.checkpoint import open_checkpoint
from secateur.gguf.file import metadata_of
from secateur.gguf.llama_cpp import library
from secateur.gguf.tokenizer import read_tokenizer
from secateur.measure.llama_cpp import LlamaCppModel
from secateur.measure.loading import load

_CONSTANTS = ("rope_freqs.", "rope_factors_")
"""Beginnings of the names of tensors that are not parameters."""


class Model(Protocol):
    """Facts about a model that measurements need; a checkpoint has them too."""

    @property
    def source(self) -> str:
        """The model as the user named it."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype at which sizes in bytes are compared."""

    @property
    def config(self) -> Any:
        """Object with `vocab_size`."""

    @property
    def max_positions(self) -> int | None:
        """Largest number of positions, if the model has a limit."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether the model comes with a tokenizer."""

    def tokenizer(self) -> Any:
        """Return the tokenizer."""


class Subject(NamedTuple):
    """Model to measure, and the function that loads it."""

    model: Model
    load: Callable[..., Any]
    """Function with the arguments of `secateur.measure.loading.load`, without the first one."""


@dataclass(frozen=True)
class LlamaCppFile:
    """GGUF file that llama.cpp runs."""

    source: str
    reader: GGUFReader
    dtype: torch.dtype = torch.float16
    has_tokenizer: bool = True

    @cached_property
    def config(self) -> Any:
        """Object with the number of token ids and of positions."""
        embedding = next(tensor for tensor in self.reader.tensors if tensor.name == "token_embd.weight")
        positions = metadata_of(self.reader).get("context_length")
        return SimpleNamespace(vocab_size=int(embedding.shape[-1]), max_position_embeddings=positions)

    @property
    def max_positions(self) -> int | None:
        """Largest number of positions, if the file states a limit."""
        return self.config.max_position_embeddings

    def tokenizer(self) -> Any:
        """Return the tokenizer of the file."""
        with quiet():
            return read_tokenizer(local_path(self.source), self.reader, read_here=True)

    @classmethod
    def of(cls, file: str) -> "LlamaCppFile":
        """Return an open file."""
        return cls(file, GGUFReader(local_path(file)))

    def load(self, *_: Any, watcher: Watcher | None = None, **__: Any) -> LlamaCppModel:
        """Load the file with llama.cpp, which computes on the CPU in types of its own."""
        (watcher or Silent()).note(f"{self.source} runs in llama.cpp on the CPU, because transformers cannot read it")
        tensors = [tensor for tensor in self.reader.tensors if not tensor.name.startswith(_CONSTANTS)]
        shapes = {tensor.name: [int(size) for size in reversed(tensor.shape)] for tensor in tensors}
        entries = Counter[str]()
        for tensor in tensors:
            entries[tensor.tensor_type.name.lower()] += prod(shapes[tensor.name])
        fields = (self.reader.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
        ends = [int(field.contents()) for field in fields if field is not None]
        return LlamaCppModel(local_path(self.source), self.config, shapes, entries.most_common(1)[0][0], ends)


def open_subject(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Subject:
    """Open a model to measure it.

    Raises:
        SecateurError: As `open_checkpoint`, unless the model is a GGUF file and llama.cpp's library is installed.
    """
    try:
        checkpoint = open_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)
        return Subject(checkpoint, partial(load, checkpoint))
    except SecateurError as error:
        if (reader := _reader_of(local_path(model))) is None:
            raise
        try:
            library()
        except SecateurError as missing:
            raise SecateurError(f"{error}; llama.cpp may be able to run it, but {missing}") from error
    file = LlamaCppFile(model, reader)
    return Subject(file, file.load)


def _reader_of(file: Path) -> GGUFReader | None:
    """Return the reader of a GGUF file; None if it is broken or of another format."""
    if file.suffix != ".gguf" or not file.is_file():
        return None
    try:
        reader = GGUFReader(file)
        metadata_of(reader)
    except Exception:  # The reader maps the file into memory, and fails in many ways on a broken one.
        return None
    return reader
