"""Algorithms that split a text into tokens, BPE and Unigram, and how their vocabularies are cut.

**Byte-pair encoding (BPE)** merges pairs of neighbouring tokens, the earliest merge in the list first. The kept merges
are those whose two parts and whose result are kept, in the old order. Let all merges that the old tokenizer makes in a
text be kept. Then the new tokenizer makes the same ones. Before each step both have the same tokens, and the old one
takes the earliest merge that is possible. This merge is also the earliest possible one in the new, shorter list. At the
end no merge of the old list is possible, so none of the new list is.

**Unigram** splits a text into the tokens whose scores have the largest sum. Removing tokens that do not occur in a text
removes no way to split it, and removing tokens that occur but are not in its best split leaves this split the best. The
score of an unknown character is the smallest score of all tokens minus a constant, so one token with the smallest score
is kept.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from secateur.base.errors import SecateurError


@dataclass(frozen=True)
class TokenModel:
    """The section `model` of a tokenizer.json."""

    stored: dict[str, Any]
    spellings: dict[int, str]
    """Tokens of the model by id; added tokens are here only if the model contains them too."""

    def parts(self, token: int) -> tuple[int, ...]:
        """Return the ids of the two tokens from which a token is made, or nothing if it is not made from others."""
        return ()

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


@dataclass(frozen=True)
class Bpe(TokenModel):
    """BPE over bytes or characters."""

    merges: list[tuple[str, str]]

    @classmethod
    def read(cls, stored: dict[str, Any]) -> "Bpe":
        """Return a BPE model from its section of tokenizer.json.

        Raises:
            SecateurError: The model has a feature that makes cutting impossible.
            ValueError, KeyError, TypeError: The section has another structure.
        """
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if stored.get(key):
                raise SecateurError(f"{key} is {stored[key]!r}, and merges with affixes cannot be cut")
        # Older files spell a merge as `left right`, newer ones as a list.
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in stored["merges"]]
        spellings = {token: spelling for spelling, token in stored["vocab"].items()}
        return cls(stored, spellings, [(left, right) for left, right in merges])

    def fixed(self) -> set[int]:
        """Return the ids of the unknown token, and of all longer tokens that cannot result from a text.

        Such tokens are control tokens, like `<pad>`. With `ignore_merges` a whole word can be any token.
        """
        unknown = {token for spelling, token in self._ids.items() if spelling == self.stored.get("unk_token")}
        if self.stored.get("ignore_merges"):
            return unknown
        made = {left + right for left, right in self.merges}
        return unknown | {token for spelling, token in self._ids.items() if len(spelling) > 1 and spelling not in made}

    def parts(self, token: int) -> tuple[int, ...]:
        """Return the two tokens that the last merge joins when BPE makes a token.

        A token is made in the same way wherever it occurs in a text: no merge crossed its ends, so the merges inside it
        were chosen in the same order as if it stood alone.
        """
        symbols, never = list(self.spellings.get(token, "")), len(self.merges)
        ranks = [self._ranks.get(pair, never) for pair in pairwise(symbols)]
        while len(ranks) > 1:
            earliest = min(ranks)
            if earliest == never:
                return ()
            place = ranks.index(earliest)
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
            del ranks[place]
            for pair in range(max(place - 1, 0), min(place + 1, len(ranks))):
                ranks[pair] = self._ranks.get((symbols[pair], symbols[pair + 1]), never)
        return tuple(self._ids[symbol] for symbol in symbols) if ranks and ranks[0] != never else ()

    def cut(self, new_ids: Mapping[int, int]) -> dict[str, Any]:
        """Return the section `model` with the kept tokens, and the merges among them.

        Args:
            new_ids: New ids of the kept tokens, by old id.
        """
        vocab = {spelling: new_ids[token] for spelling, token in self._ids.items() if token in new_ids}
        merges = [
            stored
            for stored, (left, right) in zip(self.stored["merges"], self.merges, strict=True)
            if left in vocab and right in vocab and left + right in vocab
        ]
        return {**self.stored, "vocab": vocab, "merges": merges}

    @property
    def _ids(self) -> dict[str, int]:
        ids: dict[str, int] = self.stored["vocab"]
        return ids

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        """Place in the list of merges, by pair."""
        return {pair: rank for rank, pair in enumerate(self.merges)}


@dataclass(frozen=True)
class Unigram(TokenModel):
    """Unigram over characters, as SentencePiece trains it; a token is not made from others."""

    scores: list[float]

    @classmethod
    def read(cls, stored: dict[str, Any]) -> "Unigram":
        """Return a Unigram model from its section of tokenizer.json; errors as for BPE."""
        spellings, scores = zip(*stored["vocab"], strict=True)
        return cls(stored, dict(enumerate(spellings)), list(scores))

    def fixed(self) -> set[int]:
        """Return the ids of the unknown token, of control tokens, whose score is 0, and of the worst token."""
        unknown = self.stored.get("unk_id")
        control = {token for token, score in enumerate(self.scores) if score == 0 or token == unknown}
        return control | {self.scores.index(min(self.scores))}

    def cut(self, new_ids: Mapping[int, int]) -> dict[str, Any]:
        """Return the section `model` with the kept tokens and their scores; argument as for BPE."""
        vocab = [entry for token, entry in enumerate(self.stored["vocab"]) if token in new_ids]
        unknown = self.stored.get("unk_id")
        return {**self.stored, "vocab": vocab, "unk_id": None if unknown is None else new_ids[unknown]}
