"""The algorithm of a tokenizer, with its tokens: what all algorithms have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
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

    @abstractmethod
    def cut(self, new_ids: Mapping[int, int]) -> dict[str, Any]:
        """Return the section `model` with the kept tokens only.

        Args:
            new_ids: New ids of the kept tokens, by old id.
        """
