"""The algorithm of a tokenizer, with its tokens: what all algorithms have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TokenModel(ABC):
    """The section `model` of a tokenizer.json."""

    stored: dict[str, Any]
    spellings: dict[int, str]
    """Tokens of the model by id; added tokens are here only if the model contains them too."""

    @classmethod
    @abstractmethod
    def read(cls, stored: dict[str, Any]) -> "TokenModel":
        """Return a model from its section of tokenizer.json.

        Raises:
            SecateurError: The model has a feature that makes cutting impossible.
            ValueError, KeyError, TypeError: The section has another structure.
        """

    @abstractmethod
    def fixed(self) -> set[int]:
        """Return the ids of tokens without which the model would not work, or would treat kept texts differently."""

    @abstractmethod
    def parts(self, token: int) -> tuple[int, ...]:
        """Return the ids of the two tokens from which a token is made, or nothing if it is not made from others."""

    def parts_first(self, tokens: Iterable[int], done: set[int]) -> Iterator[int]:
        """Yield tokens in order, each after the tokens that it is made from.

        Args:
            tokens: Ids of tokens.
            done: Tokens that are not yielded; each token that is yielded joins them.
        """
        for token in tokens:
            pending = [token]
            while pending:
                missing = [part for part in self.parts(pending[-1]) if part not in done]
                if missing and pending[-1] not in done:
                    pending += missing
                    continue
                last = pending.pop()
                if last not in done:
                    done.add(last)
                    yield last

    @abstractmethod
    def cut(self, new_ids: Mapping[int, int]) -> dict[str, Any]:
        """Return the section `model` with the kept tokens only.

        Args:
            new_ids: New ids of the kept tokens, by old id.
        """
