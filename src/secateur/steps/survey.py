"""One pass over the dense model: the error of every module at every width, under one criterion.

A plan is made from these curves. They are measured on the dense stream, where each module's target is its
own dense output, so that the Gram matrix of the level-2 input is the only statistic that most criteria need.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.criteria import NEEDS_INPUTS, Statistics, error_curve
from secateur.errors import SecateurError
from secateur.moments import Moments
from secateur.progress import Silent, Watcher
from secateur.stream import Arena, BlockStream, batches
from secateur.structure import Kind, Pattern
from secateur.surgery import inner_weight
from secateur.targets import PostNorm


@dataclass(frozen=True)
class Curve:
    """One module's error against width."""

    block: int
    kind: Kind
    pattern: Pattern
    errors: tuple[float, ...]
    """||XW - T||^2 over all calibration tokens after 0, 1, 2, ... pattern units have gone, in residual units."""
    energy: float
    """||residual stream after the module||^2 over the same tokens."""


@dataclass(frozen=True)
class Survey:
    """All curves of a model."""

    criterion: str
    ridge: float
    tokens: int
    curves: tuple[Curve, ...]


def survey(
    stream: BlockStream,
    rows: Tensor,
    *,
    blocks: range | None = None,
    kinds: tuple[Kind, ...] = ("heads", "channels"),
    criterion: str = "surgeon",
    ridge: float = 1.0,
    seed: int = 0,
    watcher: Watcher | None = None,
) -> Survey:
    """Measure every module's error at every width.

    Args:
        stream: an open model.
        rows: calibration tokens (rows x length).
        blocks: which blocks; all by default.
        kinds: which modules.
        criterion: the order in which units leave.
        ridge: of the refit that the error assumes.
        seed: for the criterion `random`.
        watcher: told about progress.
    """
    blocks = blocks if blocks is not None else range(len(stream))
    watcher = watcher or Silent()
    curves: list[Curve] = []
    with Arena() as arena:
        hidden = stream.embed(rows, arena)
        for index in watcher.track(range(blocks.stop), "Survey"):
            with stream.filled(index) as layer:
                if index not in blocks:
                    for at in batches(*rows.shape):
                        hidden[at] = _finite(stream.run(index, layer, hidden[at]), index)
                    continue
                tensors = dict(layer.named_parameters())
                collectors = [
                    _Collector(
                        stream, index, layer, kind, inputs=criterion in NEEDS_INPUTS and kind == "channels"
                    )
                    for kind in kinds
                    if stream.blocks[index].module(kind).locked is None
                ]
                for at in batches(*rows.shape):
                    watch = {path: see for c in collectors for path, see in c.watches().items()}
                    hidden[at] = _finite(stream.run(index, layer, hidden[at], watch=watch), index)
                energy = float(hidden.square().sum(dtype=torch.float64))
                for collector in collectors:
                    module = collector.module
                    stats = Statistics(
                        module=module,
                        tensors=tensors,
                        weight_ao=collector.norm.scale(inner_weight(module, tensors)),
                        moments=collector.moments,
                        inputs=collector.inputs,
                        ridge=ridge,
                        own_target=True,
                        seed=module_seed(seed, index, module.kind),
                    )
                    for pattern in module.patterns:
                        found = error_curve(criterion, stats, pattern)
                        rounds = found.errors[:: module.groups] if pattern == "heads" else found.errors
                        curves.append(Curve(index, module.kind, pattern, tuple(rounds.tolist()), energy))
    return Survey(criterion, ridge, rows.numel(), tuple(curves))


def module_seed(seed: int, index: int, kind: Kind) -> int:
    """A seed of its own for each module."""
    return (seed * 1_000_003 + index) * 2 + (kind == "channels")


class _Collector:
    """Sums one module's moments while the dense block runs."""

    def __init__(self, stream: BlockStream, index: int, layer: torch.nn.Module, kind: Kind, *, inputs: bool):
        self.module = stream.blocks[index].module(kind)
        width = stream.checkpoint.config.hidden_size
        self.norm = PostNorm(layer, self.module, width, stream.device)
        self.moments = Moments(self.module.units * self.module.size, device=stream.device)
        self.inputs = Moments(width, device=stream.device) if inputs else None

    def watches(self) -> dict[str, object]:
        """What to watch, by layer path."""
        result: dict[str, object] = {self.module.sink: self._sink}
        if self.inputs is not None:
            result[self.module.source] = self._source
        return result

    def _sink(self, x: Tensor, z: Tensor) -> None:
        scale = self.norm.inverse_rms(z)
        x = x if scale is None else x * scale
        self.moments.update(x.reshape(-1, x.shape[-1]))

    def _source(self, x: Tensor, _: Tensor) -> None:
        assert self.inputs is not None
        self.inputs.update(x.reshape(-1, x.shape[-1]))


def _finite(hidden: Tensor | None, index: int) -> Tensor:
    assert hidden is not None
    if not bool(torch.isfinite(hidden.sum())):
        raise SecateurError(
            f"block {index} of the dense model gives NaN or infinite activations; is it intact?"
        )
    return hidden.cpu()
