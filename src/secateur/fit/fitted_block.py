"""A fitted block: the units that it keeps and its new tensors; and the mean of several fits of one block.

    W = (1/F) sum_f W_f        over F fits, each to resampled rows of its own

Fits to different rows differ in the errors that each takes from its own rows. Their weights are so close that they can
be averaged, which cancels much of these errors.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from secateur.checkpoints.expert_matrices import BlockTensor, matrix_by_matrix
from secateur.model.mixture import Mixture
from secateur.model.stream import BlockStream
from secateur.model.structure import KeptUnits
from secateur.model.surgery import assign, masked_weight, tensors_of


@dataclass(frozen=True)
class ModuleReport:
    """Result of the fit of an attention, a feed-forward or a mixture."""

    kind: str
    kept: int
    """Number of units that it keeps."""
    units: int
    """Number of units before this run."""
    error: float
    """Mean squared error per token of the residual stream after the module: pruned minus dense stream, over the
    calibration rows with their weights. It includes the errors of earlier blocks."""
    relative: float
    """The error divided by the mean energy per token of the dense residual stream after the module."""
    unfitted: tuple[int, ...] = ()
    """Experts with too few tokens for a refit, which keep their weights."""


@dataclass(frozen=True)
class FittedBlock:
    """Block whose units are chosen and whose weights are refitted. Its tensors still have their full width."""

    index: int
    keep: KeptUnits
    """Units that are kept, by kind."""
    changed: dict[str, BlockTensor]
    """New tensors, in the dtype of the output."""
    reports: tuple[ModuleReport, ...]
    """Report of each module's fit."""


def mean_of(fits: list[FittedBlock], dense: nn.Module, dtype: torch.dtype) -> FittedBlock:
    """Return the mean of several fits of one block, in the dtype of the output; a single fit is returned unchanged."""
    first = fits[0]
    if len(fits) == 1:
        return first

    old = tensors_of(dense)

    def mean(name: str) -> BlockTensor:
        # A fit that did not change a tensor has the dense one.
        values = (fit.changed.get(name, old[name]) if name in old else fit.changed[name] for fit in fits)
        return matrix_by_matrix(partial(_mean, dtype), *values, dtype=dtype)

    names = dict.fromkeys(name for fit in fits for name in fit.changed)
    reports = tuple(_mean_report(same) for same in zip(*(fit.reports for fit in fits), strict=True))
    return FittedBlock(first.index, first.keep, {name: mean(name) for name in names}, reports)


def _mean(dtype: torch.dtype, first: Tensor, *others: Tensor) -> Tensor:
    """Return the mean of several tensors in a dtype."""
    total = first.float()
    for tensor in others:
        total = total + tensor.to(total.device).float()
    return (total / (1 + len(others))).to(dtype)


def _mean_report(reports: Sequence[ModuleReport]) -> ModuleReport:
    """Return the mean of several reports of one module; experts are unfitted if no fit fitted them."""
    first, count = reports[0], len(reports)
    return replace(
        first,
        error=sum(report.error for report in reports) / count,
        relative=sum(report.relative for report in reports) / count,
        unfitted=tuple(expert for expert in first.unfitted if all(expert in report.unfitted for report in reports)),
    )


@contextmanager
def as_fitted(stream: BlockStream, layer: nn.Module, fitted: FittedBlock) -> Iterator[None]:
    """Let a dense block compute what the fitted block computes. Its parameters are not restored on exit."""
    for name, tensor in fitted.changed.items():
        assign(layer, name, tensor.to(stream.device, torch.float32) if isinstance(tensor, Tensor) else tensor)
    tensors = layer.state_dict()
    with ExitStack() as stack:
        for module in stream.blocks[fitted.index].modules_left:
            kept = fitted.keep[module.kind]
            if module.kind_inside is not None:
                stack.enter_context(Mixture(stream, layer, module).only(torch.tensor(kept, device=stream.device)))
            else:
                assign(layer, module.output_projection.name, masked_weight(module, tensors, kept))
        yield
