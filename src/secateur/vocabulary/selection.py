"""Which tokens of a vocabulary are kept.

Always kept are special and added tokens, tokens that a config names, single bytes, and tokens that are one character of
the kept scripts. A kept token that BPE makes from others brings these along, and the tokens that they are made from.

**Scripts are exact.** A token is kept if some text of the scripts, as normalised, contains its bytes or characters.
Let BPE split such a text. Every token that it makes on the way is a part of the text, so it is kept. Then every merge
that it makes is kept, and the cut tokenizer makes the same merges (see `bpe.py`). For Unigram, every token that could
be in a split is kept, so all possible splits and their scores are unchanged. The steps before the model are not
changed: added tokens, normaliser and pre-tokenizer. Conversely, a token that no such text contains is never used.

**Padding.** The number of kept tokens is rounded up by keeping further tokens of the vocabulary. Rows without a token
would be worse: the model never learned to avoid them, so they could win.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from secateur.base.errors import SecateurError
from secateur.vocabulary.kept import KeptTokens
from secateur.vocabulary.scripts import characters_of, main_scripts, with_normalised
from secateur.vocabulary.tokenizer import StoredTokenizer

_Counts = Mapping[int, int]
"""Number of occurrences of each token in a text, by id; tokens that are missing do not occur."""


@dataclass(frozen=True)
class Selection:
    """Selection of the tokens that are kept; a tokenizer with tokens that the model lacks raises `SecateurError`."""

    tokenizer: StoredTokenizer
    rows: int
    """Number of rows of the embedding."""
    must_keep: frozenset[int] = frozenset()
    """Ids that config.json and other files name."""
    multiple: int = 64
    """The number of kept tokens is rounded up to a multiple of this number."""

    def __post_init__(self) -> None:
        # Added tokens may lie beyond the rows: they are for inputs of other kinds, or for training.
        if (largest := max(self.tokenizer.model.spellings)) >= self.rows:
            raise SecateurError(
                f"{self.tokenizer.folder}: the tokenizer has a token with the id {largest:,}, but the model has "
                f"{self.rows:,} tokens; use the tokenizer of this model"
            )

    def by_scripts(self, scripts: tuple[str, ...], counts: _Counts | None = None) -> KeptTokens:
        """Keep the tokens that can occur in texts of some scripts.

        Args:
            scripts: Codes of the scripts, from `parse_scripts`.
            counts: Occurrences of tokens in a text, which decide which further tokens are kept by rounding.

        Raises:
            SecateurError: A config names an id that no token has.
        """
        characters, counts = self._characters(scripts), counts or {}
        kept = self._with_parts(self._required(characters), self._occurring(characters))
        return self._rounded(kept, len(kept), lambda token: (-counts.get(token, 0), token))

    def by_text(self, counts: _Counts, at_least: int = 1, scripts: tuple[str, ...] | None = None) -> KeptTokens:
        """Keep the tokens that occur at least so often in a text.

        Args:
            counts: Occurrences of tokens in the text.
            at_least: Smallest number of occurrences of a token.
            scripts: Codes of the scripts whose single characters are kept; the main scripts of the text if None.

        Raises:
            SecateurError: A config names an id that no token has.
        """
        used = {token for token, count in counts.items() if count >= at_least} & self._tokens
        required = self._required(self._characters(scripts or self.main_scripts(counts)))
        kept = self._with_parts(required | used)
        return self._rounded(kept, len(kept), lambda token: (-counts.get(token, 0), token))

    def by_number(self, number: int, counts: _Counts, scripts: tuple[str, ...] | None = None) -> KeptTokens:
        """Keep a number of tokens: first the tokens of some scripts, then the tokens that occur most often in a text.

        Args:
            number: Number of tokens, before rounding.
            counts: Occurrences of tokens in the text.
            scripts: Codes of the scripts; the main scripts of the text if None.

        Raises:
            SecateurError: The number is smaller than the number of tokens that are always kept, or a config names an id
                that no token has.
        """
        characters = self._characters(scripts or self.main_scripts(counts))
        occurring, kept = self._occurring(characters), self._with_parts(self._required(characters))
        if len(kept) > self._round(number):
            raise SecateurError(
                f"{number:,} tokens are too few: special tokens, bytes and single characters alone are {len(kept):,}"
            )
        return self._rounded(kept, number, lambda token: (token not in occurring, -counts.get(token, 0), token))

    def _rounded(self, kept: set[int], number: int, order: Callable[[int], Any]) -> KeptTokens:
        """Return the selection of some tokens, and of further ones up to a rounded number.

        Args:
            kept: Tokens to keep, with the tokens that they are made from.
            number: Number of tokens, before rounding.
            order: Key by which the tokens that can be kept in addition are sorted.
        """
        kept, wanted = set(kept), self._round(number)
        further = self.tokenizer.model.parts_first(sorted(self._tokens - kept, key=order), kept)
        kept.update(islice(further, wanted - len(kept)))
        ids = sorted(kept) if len(kept) == wanted else range(self.rows)
        return self.tokenizer.keeping(ids, self.rows)

    def _round(self, number: int) -> int:
        """Return the smallest multiple that is not smaller than a number."""
        return -(-number // self.multiple) * self.multiple

    def _with_parts(self, tokens: set[int], closed: Iterable[int] = ()) -> set[int]:
        """Return tokens and the tokens that they are made from; the parts of `closed` are in `closed`."""
        kept = set(closed)
        kept.update(self.tokenizer.model.parts_first(tokens, kept))
        return kept

    @cached_property
    def _tokens(self) -> frozenset[int]:
        """Ids of all tokens that have a row in the embedding."""
        ids = {*self.tokenizer.model.spellings, *self.tokenizer.added.values()}
        return frozenset(token for token in ids if token < self.rows)

    def _characters(self, scripts: tuple[str, ...]) -> frozenset[str]:
        """Return the characters of texts of some scripts after normalisation."""
        return with_normalised(characters_of(scripts), self.tokenizer.contents)

    def _occurring(self, characters: frozenset[str]) -> set[int]:
        """Return the ids of the tokens that occur in some text of these characters."""
        occurs = self.tokenizer.alphabet.occurs_in(characters)
        return {token for token, spelling in self.tokenizer.model.spellings.items() if occurs(spelling)}

    def _required(self, characters: frozenset[str]) -> set[int]:
        """Return the ids of the tokens that are always kept, among them those that are one of some characters.

        Raises:
            SecateurError: A config names an id that no token has.
        """
        tokenizer, alphabet = self.tokenizer, self.tokenizer.alphabet
        single = {
            token
            for token, spelling in tokenizer.model.spellings.items()
            if alphabet.is_byte(spelling) or alphabet.text_of(spelling) in characters
        }
        self._check_named()
        required = single | tokenizer.named() | tokenizer.model.fixed() | self.must_keep
        return {token for token in required if token < self.rows}

    def _check_named(self) -> None:
        """Check that each id which must be kept is a token's, or a row's after the last token.

        Raises:
            SecateurError: An id is neither.
        """
        wrong = sorted(token for token in self.must_keep - self._tokens if token < self.tokenizer.size)
        if wrong:
            raise SecateurError(
                f"{self.tokenizer.folder}: a config names the token id {wrong[0]}, which is no token; correct it"
            )

    def main_scripts(self, counts: _Counts) -> tuple[str, ...]:
        """Return the codes of the main scripts of a text.

        Args:
            counts: Occurrences of tokens in the text.
        """
        spellings, alphabet = self.tokenizer.model.spellings, self.tokenizer.alphabet
        return main_scripts((alphabet.text_of(spellings.get(token, "")), count) for token, count in counts.items())
