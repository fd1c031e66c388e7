"""Token rows in groups of equal length, what each group counts, and the batches that they are run in."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.base.services import BATCH_TOKENS

OPENING_SHARE = 8
LEAST_OPENINGS = 256
"""One-token rows are at most one in eight tokens, but no fewer than these."""
OPENING_WEIGHT = 0.01
"""What a one-token row counts: enough to be fitted, given its massive activation; 0.001 and 0.05 measured worse."""


@dataclass(frozen=True)
class Batch:
    """Some rows of one group; indexes `Activations`."""

    group: int
    rows: slice
    weight: float
    """What each of its tokens counts in fits."""
    score: float
    """What it counts when units are chosen."""


@dataclass(frozen=True)
class Rows:
    """Calibration tokens: groups of rows (each rows x length), and what a token of each group counts."""

    groups: tuple[Tensor, ...]
    weights: tuple[float, ...]
    scores: tuple[float, ...] | None = None
    """What a token of each group counts when units are chosen, where that is not its weight."""
    versions: tuple[int, ...] = ()
    """Groups of which each fit takes one: as many fits are made, and their weights averaged."""
    batch_tokens: int = BATCH_TOKENS
    """Most tokens of a batch, if a row has no more."""

    @classmethod
    def of(cls, rows: Tensor | Rows) -> Rows:
        """One group of weight one, unless it is `Rows` already."""
        return rows if isinstance(rows, Rows) else cls((rows,), (1.0,))

    def with_openings(self) -> Rows:
        """These rows, and their most frequent tokens once more, each as a row of its own.

        Where rows do not begin with BOS, any token may come first, and there it must raise the massive activation
        that later positions attend to. A first position sees nothing but itself, so one token is enough to show it;
        the rows alone show one first token each, and a model fitted to these lost the others.
        """
        ids, counts = torch.unique(torch.cat([group.flatten() for group in self.groups]), return_counts=True)
        most = max(LEAST_OPENINGS, self.tokens // OPENING_SHARE)
        first = ids[counts.argsort(descending=True, stable=True)[:most]]
        return self._and((first[:, None],), OPENING_WEIGHT)

    def with_versions(self, *groups: Tensor) -> Rows:
        """These rows, and groups behind them of which each is fitted to on its own, along with all others."""
        first = len(self.groups)
        return replace(self._and(groups, 1.0), versions=(*self.versions, *range(first, first + len(groups))))

    def scored_by(self, others: Rows) -> Rows:
        """These rows for fits, and others behind them by which alone units are chosen."""
        mine, theirs = (0.0,) * len(self.groups), (0.0,) * len(others.groups)
        groups, weights = (*self.groups, *others.groups), (*self.weights, *theirs)
        return replace(self, groups=groups, weights=weights, scores=(*mine, *others.weights))

    def along(self, *groups: Tensor) -> Rows:
        """These rows, and groups behind them that count nowhere: they only run along."""
        return self._and(groups, 0.0)

    def fits(self) -> tuple[Rows, ...]:
        """The rows of each fit. The first fit also chooses the units.

        What a fit does without is an empty group there, so that groups keep their places.
        """
        result = []
        for number, own in enumerate(self.versions or (-1,)):
            others = set(self.versions) - {own}
            counts = self.weights if number or self.scores is None else map(max, self.weights, self.scores)
            part = self._only([group for group, count in enumerate(counts) if count and group not in others])
            result.append(replace(part, scores=None) if number else part)
        return tuple(result)

    def counted(self, somewhere: bool = True) -> Rows:
        """The groups that count in a fit or when units are chosen, or those that do not; all others empty."""
        counts = map(max, self.weights, self.scores or self.weights)
        return self._only([group for group, count in enumerate(counts) if bool(count) == somewhere])

    def _and(self, groups: tuple[Tensor, ...], weight: float) -> Rows:
        """More groups, which count alike in fits and in the choice of units."""
        more = (weight,) * len(groups)
        scores = None if self.scores is None else (*self.scores, *more)
        return replace(self, groups=(*self.groups, *groups), weights=(*self.weights, *more), scores=scores)

    def _only(self, wanted: Collection[int]) -> Rows:
        groups = (ids if group in wanted else ids[:0] for group, ids in enumerate(self.groups))
        return replace(self, groups=tuple(groups), versions=())

    def spans(self, rank: int, size: int) -> list[slice]:
        """Which rows of each group one of several processes has: the same batches as one alone would run, dealt out.

        A process may have none of a group; those that have fewest tokens so far get what is over. Where rows count
        nowhere, what else is in their batch changes nothing, and they are dealt out one by one.
        """
        loads = [0] * size
        result = []
        for group, weight, score in zip(self.groups, self.weights, self.scores or self.weights, strict=True):
            step = self._at_once(group) if weight or score else 1
            each, over = divmod(-(-len(group) // step), size)
            more = sorted(range(size), key=loads.__getitem__)[:over]
            batches = [each + (other in more) for other in range(size)]
            ends = [min(step * sum(batches[: other + 1]), len(group)) for other in range(size)]
            spans = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
            loads = [load + (at.stop - at.start) * group.shape[1] for load, at in zip(loads, spans, strict=True)]
            result.append(spans[rank])
        return result

    def share(self, rank: int, size: int) -> Rows:
        """The rows that one of several processes has."""
        parts = zip(self.groups, self.spans(rank, size), strict=True)
        return replace(self, groups=tuple(group[at] for group, at in parts))

    @property
    def tokens(self) -> int:
        """How many tokens are run."""
        return sum(group.numel() for group in self.groups)

    def batches(self) -> Iterator[Batch]:
        """Yield batches of at most `batch_tokens` tokens, group by group."""
        scores = self.weights if self.scores is None else self.scores
        for index, (group, weight, score) in enumerate(zip(self.groups, self.weights, scores, strict=True)):
            step = self._at_once(group)
            for start in range(0, group.shape[0], step):
                yield Batch(index, slice(start, min(start + step, group.shape[0])), weight, score)

    def ids(self, at: Batch) -> Tensor:
        """Token ids of a batch (b x t)."""
        return self.groups[at.group][at.rows]

    def _at_once(self, group: Tensor) -> int:
        return max(1, self.batch_tokens // group.shape[1])
