"""One pass over the dense model: the error of every module at every width, under one criterion.

A plan is made from these curves. They are measured on the dense stream, where each module's target is its
own dense output, so that the Gram matrix of the level-2 input is the only statistic that most criteria need.
Each token's error counts relative to its own residual stream: otherwise the few tokens with massive activations,
ten thousand times the energy of the rest, would be all that a price sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.activations import Arena, Rows
from secateur.criteria import NEEDS_INPUTS, Statistics, error_curve
from secateur.moments import Moments
from secateur.progress import Silent, Watcher
from secateur.stream import BlockStream
from secateur.structure import Kind, Pattern, Width
from secateur.surgery import inner_weight
from secateur.targets import PostNorm


@dataclass(frozen=True)
class Curve:
    """One module's error against width."""

    block: int
    kind: Kind
    pattern: Pattern
    errors: tuple[float, ...]
    """||xW - t||^2 / ||residual stream after the block||^2, the mean over tokens, once 0, 1, 2, ... pattern units
    have gone."""
    energy: float
    """||t||^2 on the same scale: the error if the whole module went."""


@dataclass(frozen=True)
class Survey:
    """All curves of a model."""

    criterion: str
    ridge: float
    tokens: int
    curves: tuple[Curve, ...]


def survey(
    stream: BlockStream,
    rows: Tensor | Rows,
    *,
    blocks: range | None = None,
    least: Width = Width(1, 1, 1),
    kinds: tuple[Kind, ...] = ("heads", "channels"),
    criterion: str = "surgeon",
    ridge: float = 0.3,
    seed: int = 0,
    watcher: Watcher | None = None,
) -> Survey:
    """Measure every module's error at every width.

    Args:
        stream: an open model.
        rows: calibration tokens (rows x length).
        blocks: which blocks; all by default.
        least: the narrowest width of interest; curves end there.
        kinds: which modules.
        criterion: the order in which units leave.
        ridge: of the refit that the error assumes.
        seed: for the criterion `random`.
        watcher: told about progress.
    """
    blocks = blocks if blocks is not None else range(len(stream))
    watcher = watcher or Silent()
    curves: list[Curve] = []
    rows = Rows.of(rows)
    with Arena() as arena:
        hidden = stream.embed(rows, arena)
        for index in watcher.track(range(blocks.stop), "Survey"):
            with stream.filled(index) as layer:
                if index not in blocks:
                    for at in rows.batches():
                        hidden[at] = stream.run_through(index, layer, hidden[at], at.group)
                    continue
                tensors = dict(layer.named_parameters())
                collectors = [
                    _Collector(stream, index, layer, kind, inputs=criterion in NEEDS_INPUTS and kind == "channels")
                    for kind in kinds
                    if stream.blocks[index].module(kind).locked is None
                ]
                for at in rows.batches():
                    watch = {path: see for c in collectors for path, see in c.watches().items()}
                    hidden[at] = after = stream.run_through(index, layer, hidden[at], at.group, watch=watch)
                    for collector in collectors:
                        collector.update(after, at.weight)
                for collector in collectors:
                    stats = Statistics(
                        module=collector.module,
                        tensors=tensors,
                        weight_ao=collector.norm.scale(inner_weight(collector.module, tensors)),
                        moments=collector.moments,
                        inputs=collector.inputs,
                        ridge=ridge,
                        own_target=True,
                        seed=module_seed(seed, index, collector.module.kind),
                    )
                    curves += _curves(index, criterion, stats, least)
    return Survey(criterion, ridge, rows.tokens, tuple(curves))


def _curves(index: int, criterion: str, stats: Statistics, least: Width) -> list[Curve]:
    """One module's curves, one for each way in which its units may leave together."""
    module, count = stats.module, stats.moments.count
    curves = []
    for pattern in module.patterns:
        errors = error_curve(criterion, stats, pattern, least.along(pattern)).errors
        rounds = errors[:: module.groups] if pattern == "heads" else errors
        curves.append(Curve(index, module.kind, pattern, tuple((rounds / count).tolist()), stats.normal.energy / count))
    return curves


def module_seed(seed: int, index: int, kind: Kind) -> int:
    """A seed of its own for each module."""
    return (seed * 1_000_003 + index) * 2 + (kind == "channels")


class _Collector:
    """Sums one module's moments while the dense block runs."""

    def __init__(self, stream: BlockStream, index: int, layer: torch.nn.Module, kind: Kind, *, inputs: bool):
        self.module = stream.blocks[index].module(kind)
        self.norm = PostNorm(layer, self.module, stream.width, stream.device)
        self.moments = Moments(self.module.units * self.module.size, device=stream.device)
        self.inputs = Moments(stream.width, device=stream.device) if inputs else None
        self.sink = self.source = torch.empty(0)

    def watches(self) -> dict[str, Any]:
        """What to watch, by layer path."""
        result: dict[str, Any] = {self.module.sink: self._sink}
        if self.inputs is not None:
            result[self.module.source] = self._source
        return result

    def _sink(self, x: Tensor, z: Tensor) -> None:
        scale = self.norm.inverse_rms(z)
        self.sink = x if scale is None else x * scale

    def _source(self, x: Tensor, _: Tensor) -> None:
        self.source = x

    def update(self, after: Tensor, weight: float) -> None:
        """Add what the last run has shown; `after` is the residual stream after the block (b, t, d)."""
        norms = torch.linalg.vector_norm(after.reshape(-1, after.shape[-1]), dim=1, keepdim=True)
        self.moments.update(self.sink.reshape(-1, self.sink.shape[-1]) / norms.clamp_min(1e-6), weight=weight)
        if self.inputs is not None:
            self.inputs.update(self.source.reshape(-1, after.shape[-1]), weight=weight)
