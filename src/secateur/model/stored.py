"""The tensors of a checkpoint by the names that transformers has for them, and in how many pieces they are stored."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.families.entry import Experts
from secateur.families.registry import FAMILIES, experts_of
from secateur.model.weights import TensorInfo

_ALIASES = {"lm_head.": "embed_out."}
"""What transformers 5 calls a tensor → what checkpoints call it, where the two differ (GPT-NeoX)."""

_TOWERS = {
    "model.": ("model.language_model.", "model.text_model.", "language_model.model."),
    "lm_head.": ("language_model.lm_head.",),
}
"""What a language model calls a tensor → what checkpoints of multimodal models do, newer ones first."""

_PLAIN = ("lm_head.", "model.layers.", "model.embed_tokens.", "model.norm.")
"""How names begin in multimodal checkpoints that call the language model's tensors as it does itself (Qwen2-VL's)."""


@dataclass(kw_only=True)
class Stored:
    """Stored tensors, and the model that they are of.

    Attributes:
        source: what the person named.
        config: the transformers config object; of a multimodal model, that of its language model.
        tensors: every stored tensor by its stored name.
        around: config.json of a multimodal model, whose towers and projectors are handed on as they are.
    """

    source: str
    config: Any
    tensors: dict[str, TensorInfo]
    around: dict[str, Any] | None = None

    def read(self, name: str) -> Tensor:
        """A tensor by its stored name, in memory of its own on the CPU, in the stored dtype.

        Raises:
            KeyError: there is no such tensor.
        """
        return self.tensors[name].read()

    def resolve(self, name: str) -> str | None:
        """The stored name of a transformers parameter, or None.

        The stored name may lack the base model's prefix (GPT-2's own checkpoints) or carry it where the given
        one does not.
        """
        return next((candidate for candidate in self.spelled(name) if candidate in self.tensors), None)

    def spelled(self, name: str) -> list[str]:
        """What checkpoints may call a transformers parameter, or the first part of its name."""
        candidates = [name]
        if self._prefix:
            candidates += [name.removeprefix(self._prefix), self._prefix + name]
        if self.around is not None:
            places = ((own, place) for own, places in _TOWERS.items() for place in places if name.startswith(own))
            candidates = [*(place + name.removeprefix(own) for own, place in places), *candidates]
        candidates += [old + name.removeprefix(new) for new, old in _ALIASES.items() if name.startswith(new)]
        for own, stored in self._experts.renamed if self._experts else ():
            candidates += [candidate.replace(own, stored, 1) for candidate in candidates if own in candidate]
        return candidates

    def own_name(self, stored: str) -> str | None:
        """What a language model calls a stored tensor; None for one of the towers and projectors around it."""
        if self.around is None or stored.startswith(_PLAIN):
            return stored
        parts = ((own, place) for own, places in _TOWERS.items() for place in places if stored.startswith(place))
        return next((own + stored.removeprefix(place) for own, place in parts), None)

    @cached_property
    def _experts(self) -> Experts | None:
        """How the model's mixtures of experts are called, if it has any."""
        return experts_of(self.config)

    def pieces(self, name: str) -> tuple[str, ...]:
        """Stored names of all that a transformers parameter holds, in order; none where something is missing.

        That is one tensor, but for the matrices of experts, which most checkpoints hold apart, expert by expert.
        """
        if found := self.resolve(name):
            return (found,)
        if not self._experts:
            return ()
        from secateur.model.modeling_secateur import overrides  # which takes a second

        index = re.search(r"\.(\d+)\.", name)
        own = overrides(self.config, int(index[1])) if index else {}
        count = own.get(self._experts.number) or getattr(self.config, self._experts.number)
        return self._apart(name, count)

    def _apart(self, name: str, count: int) -> tuple[str, ...]:
        """The stored matrices of the first experts, if they are stored one by one; none where one is missing."""
        owner, _, leaf = name.rpartition(".")
        parts = dict(self._experts.stored).get(leaf, ()) if self._experts else ()
        names = [self.resolve(f"{owner}.{e}.{part}.weight") for e in range(count) for part in parts]
        return () if None in names else tuple(map(str, names))

    def holds_experts(self, name: str) -> bool:
        """Whether a tensor of a block's experts is stored, together or apart."""
        return bool(self.resolve(name) or self._apart(name, 1))

    def read_parameter(self, name: str) -> Tensor:
        """A transformers parameter as stored, put together where checkpoints hold it in pieces.

        Raises:
            SecateurError: it is missing.
        """
        pieces = self.pieces(name)
        if not pieces:
            raise SecateurError(f"{self.source}: tensor {name} is missing")
        if len(pieces) == 1:
            return self.read(pieces[0])
        together = self.together(name)
        result = torch.empty(self._shape_of(name, pieces), dtype=self.tensors[pieces[0]].dtype)
        for expert, whole in enumerate(result):
            own = pieces[expert * together : (expert + 1) * together]
            torch.cat([self.read(piece) for piece in own], out=whole)
        return result

    def parameter_shape(self, name: str) -> tuple[int, ...]:
        """The shape of what `read_parameter` gives."""
        return self._shape_of(name, self.pieces(name))

    def _shape_of(self, name: str, pieces: tuple[str, ...]) -> tuple[int, ...]:
        """The same, of the pieces that were found."""
        shapes = [self.tensors[piece].shape for piece in pieces]
        if len(pieces) == 1:
            return shapes[0]
        together = self.together(name)
        return (len(pieces) // together, sum(shape[0] for shape in shapes[:together]), shapes[0][1])

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A parameter's values as the checkpoint holds them: by stored names, of as many experts as are left."""
        pieces = self.pieces(name)
        if len(pieces) == 1:
            return {pieces[0]: self.tensors[pieces[0]].as_stored(tensor)}
        parts = (part for whole in tensor for part in whole.chunk(self.together(name)))
        return dict(zip(pieces, parts, strict=False))

    def together(self, name: str) -> int:
        """How many stored matrices of one expert a parameter holds."""
        assert self._experts is not None
        return len(dict(self._experts.stored)[name.rpartition(".")[2]])

    @cached_property
    def _prefix(self) -> str:
        """What the causal language model calls its base model, with a dot; empty if that is unknown."""
        family = FAMILIES.get(self.config.model_type)
        return "" if family is None else f"{family.base}."
