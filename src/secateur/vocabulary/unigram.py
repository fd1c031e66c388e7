"""Unigram: a text is split into the tokens whose scores have the largest sum.

**Cutting.** Removing tokens that do not occur in a text removes no way to split it, and removing tokens that occur but
are not in its best split leaves this split the best. The score of an unknown character is the smallest score of all
tokens minus a constant, so one token with the smallest score is kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.vocabulary.model import TokenModel


@dataclass(frozen=True)
class Unigram(TokenModel):
    """Unigram over characters, as SentencePiece trains it."""

    scores: list[float]

    @classmethod
    def read(cls, stored: dict[str, Any]) -> "Unigram":
        """Return a Unigram model from its section of tokenizer.json; errors as in the base class."""
        spellings, scores = zip(*stored["vocab"], strict=True)
        return cls(stored, dict(enumerate(spellings)), list(scores))

    def fixed(self) -> set[int]:
        """Return the ids of the unknown token, of control tokens, whose score is 0, and of the worst token."""
        control = {token for token, score in enumerate(self.scores) if score == 0}
        unknown = set() if self._unknown is None else {self._unknown}
        return control | unknown | {self.scores.index(min(self.scores))}

    def parts(self, token: int) -> tuple[int, ...]:
        """Return nothing: a token of Unigram is not made from others."""
        return ()

    def cut(self, new_ids: Mapping[int, int]) -> dict[str, Any]:
        """Return the section `model` with the kept tokens and their scores."""
        vocab = [entry for token, entry in enumerate(self.stored["vocab"]) if token in new_ids]
        unknown = None if self._unknown is None else new_ids[self._unknown]
        return {**self.stored, "vocab": vocab, "unk_id": unknown}

    @property
    def _unknown(self) -> int | None:
        """Id of the token for unknown characters."""
        return self.stored.get("unk_id")
