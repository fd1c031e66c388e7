"""A GGUF file as a network that llama.cpp runs, with the part of transformers' interface that measurements use.

transformers cannot read some files that secateur writes, because their blocks differ in width or because it does not
know their architecture. Logits come from llama.cpp's library.

Shapes: b rows of a batch, t positions, v token ids of the vocabulary.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from secateur.base.errors import SecateurError
from secateur.gguf.llama_cpp import library

ROOM = 256
"""Multiple to which the number of positions in a context is rounded, so that a longer row rarely needs a new one."""


class LlamaCppModel(nn.Module):
    """Network that llama.cpp runs.

    While it generates, it keeps the keys and values of the rows, so that only the new token of each row runs.

    Attributes:
        config: `vocab_size` and `max_position_embeddings`.
        generation_config: Settings of `generate`.
        device: The device, always the CPU.
        dtype: Name of the most frequent type of tensors.
    """

    def __init__(self, file: Path, config: Any, shapes: Mapping[str, Sequence[int]], dtype: str, ends: list[int]):
        """Load the file.

        Args:
            file: The GGUF file.
            config: `vocab_size` and `max_position_embeddings`.
            shapes: Shapes of the parameters, by llama.cpp's names.
            dtype: Name of the most frequent type of tensors.
            ends: Ids of the tokens that end a text.

        Raises:
            SecateurError: llama.cpp does not load the file.
        """
        super().__init__()
        self.config, self.generation_config = config, GenerationConfig(eos_token_id=ends or None)
        self.device, self.dtype = torch.device("cpu"), dtype
        tensors = {name: nn.Parameter(torch.empty(*shape, device="meta")) for name, shape in shapes.items()}
        # Without values: for the number of parameters and the size of the vocabulary.
        self.tensors, self._embedding = nn.ParameterList(tensors.values()), tensors["token_embd.weight"]
        self._library, self._ffi = library()
        settings = self._library.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = self._library.llama_model_load_from_file(str(file).encode(), settings)
        if self._model == self._ffi.NULL:
            raise SecateurError(f"{file}: llama.cpp does not load this file; export the model again")
        weakref.finalize(self, self._library.llama_model_free, self._model)
        self._context: Any = None
        self._free: Callable[[], Any] = lambda: None
        self._kept: list[list[int]] = []
        """Token ids whose keys and values the context holds, by row."""
        self._room = 0

    def get_input_embeddings(self) -> SimpleNamespace:
        """Return an object whose `weight` has the shape of the embedding."""
        return SimpleNamespace(weight=self._embedding)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        """Return `logits` (b x t x v) of token ids (b x t)."""
        self._reserve(*input_ids.shape)
        rows = dict(enumerate(input_ids.tolist()))
        return SimpleNamespace(logits=self._decode(rows, every_position=True).unflatten(0, input_ids.shape))

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None,
        stopping_criteria: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> Tensor:
        """Return token ids (b x t) with the likeliest tokens after them, until every row has ended."""
        settings = self.generation_config
        ends = torch.tensor(settings.eos_token_id or [], dtype=torch.long)
        self._reserve(len(input_ids), input_ids.shape[1] + settings.max_new_tokens)
        rows = {row: ids[attention_mask[row].bool()].tolist() for row, ids in enumerate(input_ids)}
        for _ in range(settings.max_new_tokens):
            logits_bv = self._decode(rows)
            if logits_processor is not None:
                logits_bv = logits_processor(input_ids, logits_bv)
            tokens = torch.full((len(input_ids),), settings.pad_token_id)
            tokens[list(rows)] = logits_bv.argmax(-1)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            rows = {row: [*ids, int(tokens[row])] for row, ids in rows.items() if not torch.isin(tokens[row], ends)}
            if stopping_criteria is not None:
                stopping_criteria(input_ids, logits_bv)
            if not rows:
                break
        return input_ids

    def _reserve(self, rows: int, positions: int) -> None:
        """Make a context without tokens for a number of rows and positions, unless there is one that is large
        enough, which is emptied."""
        if rows <= len(self._kept) and positions <= self._room:
            self._kept = [self._keep(row, 0) for row in range(len(self._kept))]
            return
        self._free()
        self._room, self._kept = -(-positions // ROOM) * ROOM, [[] for _ in range(rows)]
        settings = self._library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = rows * self._room
        settings.n_seq_max, settings.swa_full = rows, True
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self._context = self._library.llama_init_from_model(self._model, settings)
        if self._context == self._ffi.NULL:
            raise SecateurError("llama.cpp has no memory for the keys and values of these rows; use shorter ones")
        self._free = weakref.finalize(self, self._library.llama_free, self._context)

    def _keep(self, row: int, count: int) -> list[int]:
        """Remove the keys and values of a row after its first tokens, and return the ids of those that are left."""
        memory = self._library.llama_get_memory(self._context)
        if not self._library.llama_memory_seq_rm(memory, row, count, -1):
            self._library.llama_memory_seq_rm(memory, row, 0, -1)
            count = 0
        return self._kept[row][:count]

    def _decode(self, rows: Mapping[int, list[int]], every_position: bool = False) -> Tensor:
        """Run the tokens of rows that the context does not hold yet.

        Args:
            rows: Token ids by row, from the first position.
            every_position: Whether to return the logits of all tokens that run, not of each row's last one only.

        Returns:
            Logits (tokens x v), row by row.
        """
        new: list[tuple[int, int, int, bool]] = []
        for row, ids in rows.items():
            # The last token always runs, because its logits are needed.
            start = min(_same_start(self._kept[row], ids), len(ids) - 1)
            start = len(self._keep(row, start))
            new += [
                (row, place, ids[place], every_position or place + 1 == len(ids)) for place in range(start, len(ids))
            ]
            self._kept[row] = list(ids)
        batch = self._library.llama_batch_init(len(new), 0, 1)
        try:
            batch.n_tokens = len(new)
            for number, (row, place, token, wanted) in enumerate(new):
                batch.token[number], batch.pos[number], batch.logits[number] = token, place, wanted
                batch.n_seq_id[number], batch.seq_id[number][0] = 1, row
            if self._library.llama_decode(self._context, batch) != 0:
                raise SecateurError("llama.cpp does not run this model; export it again")
            return torch.stack([self._logits(number) for number, one in enumerate(new) if one[3]])
        finally:
            self._library.llama_batch_free(batch)

    def _logits(self, number: int) -> Tensor:
        """Return a copy of the logits of one token of the last batch (v)."""
        values = self._library.llama_get_logits_ith(self._context, number)
        size = len(self._embedding) * torch.float32.itemsize
        return torch.frombuffer(bytearray(self._ffi.buffer(values, size)), dtype=torch.float32)


def _same_start(kept: Sequence[int], ids: Sequence[int]) -> int:
    """Return the number of first tokens that two rows share."""
    pairs = zip(kept, ids, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(kept), len(ids)))
