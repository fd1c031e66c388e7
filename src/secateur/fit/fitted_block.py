"""A block as a fit leaves it: the mean of several, and the dense block made to compute the same."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from secateur.fit.stage import ModuleReport
from secateur.model.held import plain
from secateur.model.mixture import Mixture
from secateur.model.stream import BlockStream
from secateur.model.structure import KeptUnits
from secateur.model.surgery import assign, masked_weight


@dataclass(frozen=True)
class FittedBlock:
    """One block whose units have been chosen and whose weights have been refitted, not yet cut."""

    index: int
    keep: KeptUnits
    changed: dict[str, Tensor]
    """Tensors with new values at full width, in the dtype of the output."""
    reports: tuple[ModuleReport, ...]


def mean_of(found: list[FittedBlock], dense: nn.Module, dtype: torch.dtype) -> FittedBlock:
    """The mean of several fits of one block, rounded as it will be written.

    Fits to different rows err differently beside what they have in common, and weights so near to each other can be
    averaged: much of what each took from its own rows cancels.
    """
    first, *others = found
    if not others:
        return first

    def value(one: FittedBlock, name: str) -> Tensor:
        # Where one fit had nothing to gain, its weights are the dense ones.
        own = one.changed[name] if name in one.changed else plain(dense.get_parameter(name).data).cpu()
        return own.float()

    names = dict.fromkeys(name for one in found for name in one.changed)
    changed = {
        name: (sum((value(one, name) for one in others), value(first, name)) / len(found)).to(dtype) for name in names
    }
    reports = tuple(
        replace(
            same[0],
            error=sum(report.error for report in same) / len(found),
            relative=sum(report.relative for report in same) / len(found),
            relative_before=sum(report.relative_before for report in same) / len(found),
            unfitted=tuple(expert for expert in same[0].unfitted if all(expert in one.unfitted for one in same)),
        )
        for same in zip(*(one.reports for one in found), strict=True)
    )
    return FittedBlock(first.index, first.keep, changed, reports)


@contextmanager
def as_fitted(stream: BlockStream, layer: nn.Module, fitted: FittedBlock) -> Iterator[None]:
    """Let a block compute what it will once its units are gone; its parameters stay as they then are."""
    for name, tensor in fitted.changed.items():
        assign(layer, name, stream.held(name, tensor.to(stream.device)))
    tensors = layer.state_dict()
    with ExitStack() as stack:
        for module in stream.blocks[fitted.index].modules:
            kept = fitted.keep[module.kind]
            if module.kind == "experts":
                stack.enter_context(Mixture(stream, layer, module).only(torch.tensor(kept, device=stream.device)))
            else:
                assign(layer, module.output_projection.name, masked_weight(module, tensors, kept))
        yield
