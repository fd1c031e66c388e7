"""Token rows and the activations they give: in groups of equal length, cut into batches, in memory or in files."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BATCH_TOKENS = 2048
"""Tokens run through a block at once: large enough for fast products, small beside a block's weights."""

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
        return Rows(groups, weights, (*mine, *others.weights), self.versions)

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

    def beside(self) -> Rows:
        """The groups that count nowhere, all others empty."""
        counts = map(max, self.weights, self.scores or self.weights)
        return self._only([group for group, count in enumerate(counts) if not count])

    def _and(self, groups: tuple[Tensor, ...], weight: float) -> Rows:
        """More groups, which count alike in fits and in the choice of units."""
        more = (weight,) * len(groups)
        scores = None if self.scores is None else (*self.scores, *more)
        return Rows((*self.groups, *groups), (*self.weights, *more), scores, self.versions)

    def _only(self, wanted: Collection[int]) -> Rows:
        groups = (ids if group in wanted else ids[:0] for group, ids in enumerate(self.groups))
        return replace(self, groups=tuple(groups), versions=())

    @property
    def tokens(self) -> int:
        """How many tokens are run."""
        return sum(group.numel() for group in self.groups)

    def batches(self) -> Iterator[Batch]:
        """Batches of at most `BATCH_TOKENS` tokens, group by group."""
        scores = self.weights if self.scores is None else self.scores
        for index, (group, weight, score) in enumerate(zip(self.groups, self.weights, scores, strict=True)):
            step = max(1, BATCH_TOKENS // group.shape[1])
            for start in range(0, group.shape[0], step):
                yield Batch(index, slice(start, min(start + step, group.shape[0])), weight, score)

    def ids(self, at: Batch) -> Tensor:
        """Token ids of a batch (b x t)."""
        return self.groups[at.group][at.rows]


class Activations:
    """One vector for each token of some `Rows`, on the host; read and written by the batch (b x t x width)."""

    def __init__(self, parts: list[Tensor]):
        self.parts = parts

    def __getitem__(self, at: Batch) -> Tensor:
        return self.parts[at.group][at.rows]

    def __setitem__(self, at: Batch, values: Tensor) -> None:
        part = self.parts[at.group][at.rows]
        part.copy_(values.reshape(part.shape))

    def copy_(self, other: Activations) -> None:
        """Take over another's values."""
        for part, source in zip(self.parts, other.parts, strict=True):
            part.copy_(source)

    def energy(self, rows: Rows, scale: Tensor | None = None) -> float:
        """Sum of the squared norms, each token counted by its weight, and each entry by a scale (width)."""
        factor = 1.0 if scale is None else scale.cpu()
        norms = ((at.weight, torch.linalg.vector_norm(self[at] * factor)) for at in rows.batches())
        return sum(weight * float(norm) ** 2 for weight, norm in norms)


class Arena:
    """Room for activations: in memory up to a limit, in temporary files beyond it."""

    def __init__(self, limit: int | None = None):
        """Start empty; the default limit in bytes is a quarter of the machine's memory."""
        if limit is None:
            limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
        self.limit = limit
        self.used = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0

    def empty(self, rows: Rows, width: int, dtype: torch.dtype = torch.float32) -> Activations:
        """Uninitialised activations of some rows."""
        return Activations([self._empty((*group.shape, width), dtype) for group in rows.groups])

    def release(self, activations: Activations) -> None:
        """Give their room back; they must not be used any more."""
        for part in activations.parts:
            file = part.untyped_storage().filename
            if file:
                os.unlink(file)
            else:
                self.used -= part.numel() * part.element_size()
        activations.parts = []

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        if self.used + dtype.itemsize * count <= self.limit:
            self.used += dtype.itemsize * count
            return torch.empty(shape, dtype=dtype)
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="secateur-")
        self._files += 1
        path = os.path.join(self._folder.name, str(self._files))
        return torch.from_file(path, shared=True, size=count, dtype=dtype).view(shape)

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()
