"""Stored tensors of a checkpoint by transformers' names, and the pieces in which they are stored."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.checkpoints.expert_matrices import BlockTensor, ExpertMatrices
from secateur.checkpoints.modeling_secateur import overrides
from secateur.checkpoints.weights import OneByOne, TensorInfo
from secateur.families.family import Experts
from secateur.families.registry import experts_of, known_family

_ALIASES = {"lm_head.": "embed_out."}
"""Checkpoints' names of tensors for which transformers 5 has another name (GPT-NeoX), by transformers' name."""

_OUTER_STARTS = (
    ("model.", "model.language_model."),
    ("model.", "model.text_model."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
"""Beginnings of tensor names in a language model, each with a beginning that checkpoints of multimodal models have in
its place; newer ones first."""

_PLAIN = ("lm_head.", "model.layers.", "model.embed_tokens.", "model.norm.")
"""Beginnings of names in multimodal checkpoints that use the language model's own names (Qwen2-VL)."""


@dataclass(kw_only=True)
class Stored:
    """Stored tensors of a model.

    Attributes:
        source: The model as the user named it.
        config: The transformers config object; for a multimodal model, its language model's.
        tensors: All stored tensors by stored name.
        multimodal_config: config.json of a multimodal model; its towers and projectors are copied unchanged.
        aliases: Stored names by transformers' names, where transformers renames what it loads.
    """

    source: str
    config: Any
    tensors: dict[str, TensorInfo]
    multimodal_config: dict[str, Any] | None = None
    aliases: dict[str, str] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """Return a tensor by its stored name, in CPU memory, in the stored dtype.

        Raises:
            KeyError: There is no such tensor.
        """
        return self.tensors[name].read()

    def resolve(self, name: str) -> str | None:
        """Return the stored name of a transformers parameter; None if it is not stored.

        The stored name may lack the prefix of the base model (GPT-2's own checkpoints), or have a prefix that the given
        name lacks.
        """
        return next((candidate for candidate in self.candidate_names(name) if candidate in self.tensors), None)

    def candidate_names(self, name: str) -> list[str]:
        """Return the possible stored names of a transformers parameter, or of the first part of its name."""
        candidates = [self.aliases.get(name, name)]
        if self._prefix:
            candidates += [name.removeprefix(self._prefix), self._prefix + name]
        if self.multimodal_config is not None:
            starts = [(start, outer) for start, outer in _OUTER_STARTS if name.startswith(start)]
            candidates = [*(outer + name.removeprefix(start) for start, outer in starts), *candidates]
        candidates += [old + name.removeprefix(new) for new, old in _ALIASES.items() if name.startswith(new)]
        return candidates

    def own_name(self, stored: str) -> str | None:
        """Return the language model's name of a stored tensor; None for a tensor of a tower or projector."""
        if self.multimodal_config is None or stored.startswith(_PLAIN):
            return stored
        names = (start + stored.removeprefix(outer) for start, outer in _OUTER_STARTS if stored.startswith(outer))
        return next(names, None)

    @cached_property
    def _experts(self) -> Experts | None:
        """Entry of the model's mixtures of experts; None without experts."""
        return experts_of(self.config)

    def pieces(self, name: str) -> tuple[str, ...]:
        """Return the stored names of the pieces of a transformers parameter, in order; empty if a piece is missing.

        Most parameters are one piece. Most checkpoints store the matrices of experts one by one.
        """
        if found := self.resolve(name):
            return (found,)
        if not self._experts:
            return ()
        index = re.search(r"\.(\d+)\.", name)
        numbers = overrides(self.config, int(index[1])) if index else {}
        count = numbers.get(self._experts.number) or getattr(self.config, self._experts.number)
        owner, _, leaf = name.rpartition(".")
        parts = dict(self._experts.stored).get(leaf, ())
        names = [self.resolve(f"{owner}.{e}.{part}.weight") for e in range(count) for part in parts]
        return () if None in names else tuple(map(str, names))

    def parameter(self, name: str) -> TensorInfo:
        """Return a transformers parameter as it is stored, put together from its pieces when it is read.

        Raises:
            SecateurError: The parameter or a piece of it is missing.
        """
        infos = [self.tensors[piece] for piece in self.pieces(name)]
        if not infos:
            raise SecateurError(f"{self.source}: tensor {name} is missing")
        return infos[0] if len(infos) == 1 else OneByOne.of(infos, self.matrices_per_expert(name))

    def expert_matrices(self, name: str) -> ExpertMatrices:
        """Return the matrices of all experts that a transformers parameter holds, each read when it is used.

        Raises:
            SecateurError: The parameter is missing.
        """
        info = self.parameter(name)
        return ExpertMatrices(info.shape, info.dtype, info.read_entry)

    def split(self, name: str, tensor: BlockTensor) -> Iterator[tuple[str, BlockTensor]]:
        """Yield a parameter's values with their stored names, for the experts that are left."""
        pieces = self.pieces(name)
        if len(pieces) == 1:
            yield pieces[0], self.tensors[pieces[0]].as_stored(tensor)
            return
        parts = (part for joined in tensor for part in joined.chunk(self.matrices_per_expert(name)))
        yield from zip(pieces, parts, strict=False)

    def matrices_per_expert(self, name: str) -> int:
        """Return the number of stored matrices of one expert that a parameter joins."""
        assert self._experts is not None
        return len(dict(self._experts.stored)[name.rpartition(".")[2]])

    @cached_property
    def _prefix(self) -> str:
        """Name of the base model in the causal language model, with a dot; empty if unknown."""
        family = known_family(self.config)
        return "" if family is None else f"{family.base}."
