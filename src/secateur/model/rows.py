"""Token rows in groups of equal length, the weights of their tokens, and the batches in which they are run."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.base.services import BATCH_TOKENS

HELD_OUT_TOKENS = 256
"""Largest number of tokens in a batch of held-out rows. There are few such rows, which several processes share."""
OPENING_SHARE = 8
"""Number of calibration tokens for each of the rows of one token."""
LEAST_OPENINGS = 256
"""Smallest limit on the number of rows of one token."""
OPENING_WEIGHT = 0.01
"""Token weight of a row of one token. The massive activation is fitted with this weight; 0.001 and 0.05 gave worse
perplexities."""


@dataclass(frozen=True)
class Batch:
    """Batch of rows of one group; an index of `Activations`."""

    group: int
    rows: slice
    weight: float
    """Weight of each token in fits."""
    choice_weight: float
    """Weight of each token in the choice of units."""


@dataclass(frozen=True)
class Rows:
    """Calibration tokens: groups of rows (token ids, rows x length), and a token weight for each group."""

    groups: tuple[Tensor, ...]
    weights: tuple[float, ...]
    """Weight of a token of each group in fits; zero for held-out rows, to which no weight is fitted."""
    choice_weights: tuple[float, ...] | None = None
    """Weight of a token of each group in the choice of units; None for the same weights as in fits."""
    resampled: tuple[int, ...] = ()
    """Groups of resampled rows. Each fit takes one of these groups; the fitted weights of all fits are averaged."""
    batch_tokens: int = BATCH_TOKENS
    """Largest number of tokens in a batch; a longer row is a batch of its own."""

    @classmethod
    def of(cls, rows: Tensor | Rows) -> Rows:
        """Return rows of token ids as one group of weight one; return `Rows` unchanged."""
        return rows if isinstance(rows, Rows) else cls((rows,), (1.0,))

    def with_openings(self) -> Rows:
        """Return these rows, and their most frequent tokens as rows of one token.

        If texts do not begin with BOS, any token may come first, and the model must then give it the massive activation
        to which later positions attend. The first position attends to itself alone, so a row of one token is enough to
        show it. Ordinary rows show one first token each, and a model fitted to these alone lost the activation for all
        other tokens.
        """
        ids, counts = torch.unique(torch.cat([group.flatten() for group in self.groups]), return_counts=True)
        most = max(LEAST_OPENINGS, self.tokens // OPENING_SHARE)
        first = ids[counts.argsort(descending=True, stable=True)[:most]]
        return self._extended((first[:, None],), OPENING_WEIGHT)

    def with_resampled(self, *groups: Tensor) -> Rows:
        """Return these rows and groups of resampled rows, one group for each fit."""
        first = len(self.groups)
        return replace(self._extended(groups, 1.0), resampled=(*self.resampled, *range(first, first + len(groups))))

    def with_choice_rows(self, others: Rows) -> Rows:
        """Return these rows for fits only, and other rows for the choice of units only."""
        mine, theirs = (0.0,) * len(self.groups), (0.0,) * len(others.groups)
        groups, weights = (*self.groups, *others.groups), (*self.weights, *theirs)
        return replace(self, groups=groups, weights=weights, choice_weights=(*mine, *others.weights))

    def with_held_out(self, *groups: Tensor) -> Rows:
        """Return these rows and groups of held-out rows, which run through the model but are not used in fits."""
        return self._extended(groups, 0.0)

    def fits(self) -> tuple[Rows, ...]:
        """Return the rows of each fit. The first fit also chooses the units.

        Groups that a fit does not use are empty, so that the other groups keep their indices.
        """
        result = []
        for number, own in enumerate(self.resampled or (-1,)):
            others = set(self.resampled) - {own}
            counts = self.weights if number else map(max, self.weights, self._weights_of_choice)
            part = self._only([group for group, count in enumerate(counts) if count and group not in others])
            result.append(replace(part, choice_weights=None) if number else part)
        return tuple(result)

    def weighted(self, wanted: bool = True) -> Rows:
        """Return the groups with a weight in fits or in the choice of units; or, unless `wanted`, the held-out groups.
        All other groups are empty."""
        counts = map(max, self.weights, self._weights_of_choice)
        return self._only([group for group, count in enumerate(counts) if bool(count) == wanted])

    def _extended(self, groups: tuple[Tensor, ...], weight: float) -> Rows:
        """Return these rows and more groups, with one weight for fits and for the choice of units."""
        more = (weight,) * len(groups)
        choice_weights = None if self.choice_weights is None else (*self.choice_weights, *more)
        weights = (*self.weights, *more)
        return replace(self, groups=(*self.groups, *groups), weights=weights, choice_weights=choice_weights)

    @property
    def _weights_of_choice(self) -> tuple[float, ...]:
        """Weight of a token of each group in the choice of units."""
        return self.weights if self.choice_weights is None else self.choice_weights

    def _only(self, wanted: Collection[int]) -> Rows:
        groups = (ids if group in wanted else ids[:0] for group, ids in enumerate(self.groups))
        return replace(self, groups=tuple(groups), resampled=())

    def spans(self, rank: int, size: int) -> list[slice]:
        """Return the range of rows that one of several processes runs, for each group.

        Processes share the batches that one process alone would run. Batches that cannot be shared evenly go to the
        processes with the fewest tokens so far, so that a process may have no rows of a group.

        Args:
            rank: Rank of the process.
            size: Number of processes.
        """
        loads = [0] * size
        result = []
        for group, *weights in zip(self.groups, self.weights, self._weights_of_choice, strict=True):
            step = self._rows_per_batch(group, any(weights))
            each, over = divmod(-(-len(group) // step), size)
            more = sorted(range(size), key=loads.__getitem__)[:over]
            batches = [each + (other in more) for other in range(size)]
            ends = [min(step * sum(batches[: other + 1]), len(group)) for other in range(size)]
            spans = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
            loads = [load + (at.stop - at.start) * group.shape[1] for load, at in zip(loads, spans, strict=True)]
            result.append(spans[rank])
        return result

    def share(self, rank: int, size: int) -> Rows:
        """Return the rows that one of several processes runs."""
        parts = zip(self.groups, self.spans(rank, size), strict=True)
        return replace(self, groups=tuple(group[at] for group, at in parts))

    @property
    def tokens(self) -> int:
        """Number of tokens in all groups."""
        return sum(group.numel() for group in self.groups)

    def batches(self) -> Iterator[Batch]:
        """Yield batches of at most `batch_tokens` tokens, group by group; smaller ones of held-out rows."""
        weights = zip(self.weights, self._weights_of_choice, strict=True)
        for index, (group, (weight, choice_weight)) in enumerate(zip(self.groups, weights, strict=True)):
            step = self._rows_per_batch(group, bool(weight or choice_weight))
            for start in range(0, group.shape[0], step):
                yield Batch(index, slice(start, min(start + step, group.shape[0])), weight, choice_weight)

    def ids(self, at: Batch) -> Tensor:
        """Return the token ids of a batch (b x t)."""
        return self.groups[at.group][at.rows]

    def _rows_per_batch(self, group: Tensor, is_weighted: bool) -> int:
        tokens = self.batch_tokens if is_weighted else min(self.batch_tokens, HELD_OUT_TOKENS)
        return max(1, tokens // group.shape[1])
