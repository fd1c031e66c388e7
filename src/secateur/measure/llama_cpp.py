"""A GGUF file that llama.cpp runs, with the part of transformers' interface that measurements use.

transformers cannot read some files that secateur writes, because their blocks differ in width or because it does not
know their architecture. Logits come from llama.cpp's library.

Shapes: b rows of a batch, t positions, v token ids of the vocabulary.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from gguf import GGUFReader
from torch import Tensor, nn
from transformers import GenerationConfig

from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.quiet import quiet
from secateur.gguf.file import metadata_of
from secateur.gguf.llama_cpp import library
from secateur.gguf.tokenizer import read_tokenizer

ROOM = 256
"""Multiple to which the number of positions in a context is rounded, so that a longer row rarely needs a new one."""
_CONSTANTS = ("rope_freqs.", "rope_factors_")
"""Beginnings of the names of tensors that are not parameters."""


class LlamaCppFile:
    """GGUF file that is opened but not loaded, with the facts of a checkpoint that measurements need."""

    dtype, has_tokenizer = torch.float16, True

    def __init__(self, source: str):
        self.source, self.reader = source, GGUFReader(local_path(source))
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors if not tensor.name.startswith(_CONSTANTS)}
        self.max_positions = metadata_of(self.reader).get("context_length")
        vocabulary = int(self.tensors["token_embd.weight"].shape[-1])
        self.config = SimpleNamespace(vocab_size=vocabulary, max_position_embeddings=self.max_positions)

    def tokenizer(self) -> Any:
        """Return the tokenizer of the file."""
        with quiet():
            return read_tokenizer(local_path(self.source), self.reader, read_here=True)

    def end_tokens(self) -> list[int]:
        """Return the ids of the tokens that end a text."""
        fields = (self.reader.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
        return [int(field.contents()) for field in fields if field is not None]


class LlamaCppModel(nn.Module):
    """Network that llama.cpp runs on the CPU, in types of its own.

    While it generates, it keeps the keys and values of the rows, so that only the new token of each row runs.

    Attributes:
        config: `vocab_size` and `max_position_embeddings`.
        generation_config: Settings of `generate`.
        device: The device, always the CPU.
        dtype: Name of the most frequent type of tensors.
    """

    def __init__(self, file: LlamaCppFile):
        """Load a file.

        Raises:
            SecateurError: llama.cpp does not load the file.
        """
        super().__init__()
        self.config, self.generation_config = file.config, GenerationConfig(eos_token_id=file.end_tokens() or None)
        self.device, entries = torch.device("cpu"), Counter[str]()
        # Without values: for the number of parameters and the size of the vocabulary.
        parameters = {}
        for name, tensor in file.tensors.items():
            shape = [int(size) for size in reversed(tensor.shape)]
            parameters[name] = nn.Parameter(torch.empty(shape, device="meta"))
            entries[tensor.tensor_type.name.lower()] += prod(shape)
        self.dtype = entries.most_common(1)[0][0]
        self.tensors, self._embedding = nn.ParameterList(parameters.values()), parameters["token_embd.weight"]
        self._library, self._ffi = library()
        settings = self._library.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = self._library.llama_model_load_from_file(str(local_path(file.source)).encode(), settings)
        if self._model == self._ffi.NULL:
            raise SecateurError(f"{file.source}: llama.cpp does not load this file; export the model again")
        weakref.finalize(self, self._library.llama_model_free, self._model)
        self._context: Any = None
        self._free: Callable[[], Any] = lambda: None
        self._held: list[int] = []
        """Number of tokens of each row whose keys and values the context holds."""
        self._room = 0

    def get_input_embeddings(self) -> SimpleNamespace:
        """Return an object whose `weight` has the shape of the embedding."""
        return SimpleNamespace(weight=self._embedding)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        """Return `logits` (b x t x v) of token ids (b x t)."""
        self._reserve(*input_ids.shape)
        logits = self._decode(dict(enumerate(input_ids.tolist())), every_position=True)
        return SimpleNamespace(logits=logits.unflatten(0, input_ids.shape))

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None,
        stopping_criteria: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> Tensor:
        """Return token ids (b x t) with the likeliest tokens after them, until every row has ended."""
        settings = self.generation_config
        ends = settings.eos_token_id or []
        self._reserve(len(input_ids), input_ids.shape[1] + settings.max_new_tokens)
        new = {row: ids[attention_mask[row].bool()].tolist() for row, ids in enumerate(input_ids)}
        for _ in range(settings.max_new_tokens):
            logits_bv = self._decode(new)
            if logits_processor is not None:
                logits_bv = logits_processor(input_ids, logits_bv)
            tokens = torch.full((len(input_ids),), settings.pad_token_id)
            tokens[list(new)] = logits_bv.argmax(-1)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            new = {row: [token] for row in new if (token := int(tokens[row])) not in ends}
            if stopping_criteria is not None:
                stopping_criteria(input_ids, logits_bv)
            if not new:
                break
        return input_ids

    def _reserve(self, rows: int, positions: int) -> None:
        """Empty the context, or make a larger one where it has no room for a number of rows and positions."""
        if rows <= len(self._held) and positions <= self._room:
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
            self._held = [0] * len(self._held)
            return
        self._free()
        self._room, self._held = -(-positions // ROOM) * ROOM, [0] * rows
        settings = self._library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = rows * self._room
        settings.n_seq_max, settings.swa_full = rows, True
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self._context = self._library.llama_init_from_model(self._model, settings)
        if self._context == self._ffi.NULL:
            raise SecateurError("llama.cpp has no memory for the keys and values of these rows; use shorter ones")
        self._free = weakref.finalize(self, self._library.llama_free, self._context)

    def _decode(self, new: Mapping[int, Sequence[int]], every_position: bool = False) -> Tensor:
        """Run tokens after those of the same rows that the context holds.

        Args:
            new: Token ids by row.
            every_position: Whether to return the logits of all tokens, not of each row's last one only.

        Returns:
            Logits (tokens x v), row by row.
        """
        batch, number, wanted = self._library.llama_batch_init(sum(map(len, new.values())), 0, 1), 0, []
        try:
            for row, ids in new.items():
                for place, token in enumerate(ids):
                    batch.token[number], batch.pos[number] = token, self._held[row] + place
                    batch.n_seq_id[number], batch.seq_id[number][0] = 1, row
                    batch.logits[number] = every_position or place + 1 == len(ids)
                    wanted += [number] if batch.logits[number] else []
                    number += 1
                self._held[row] += len(ids)
            batch.n_tokens = number
            if self._library.llama_decode(self._context, batch) != 0:
                raise SecateurError("llama.cpp does not run this model; export it again")
            return torch.stack([self._logits(place) for place in wanted])
        finally:
            self._library.llama_batch_free(batch)

    def _logits(self, number: int) -> Tensor:
        """Return a copy of the logits of one token of the last batch (v)."""
        values = self._library.llama_get_logits_ith(self._context, number)
        size = len(self._embedding) * torch.float32.itemsize
        return torch.frombuffer(bytearray(self._ffi.buffer(values, size)), dtype=torch.float32)
