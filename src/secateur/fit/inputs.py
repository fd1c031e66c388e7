"""A module's level-2 inputs in the pruned stream: run up to there, kept for the length of the module, and summed.

Shapes: n tokens, a level-2 input entries, k of them kept; rows x t x a for what is stored.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.fit.target import ModuleTarget
from secateur.model.arena import Activations
from secateur.model.rows import Batch
from secateur.model.surgery import inner_entries
from secateur.numerics.moments import Moments


@dataclass(frozen=True)
class Inputs:
    """A module's level-2 input in the pruned stream, stored, and its moments with the target."""

    entries: Tensor
    """Which of its entries these are, ascending."""
    stored: Activations
    moments: Moments

    def among(self, kept: Tensor) -> Tensor:
        """Where kept entries lie among those stored."""
        return torch.searchsorted(self.entries, kept)

    def times(self, weight_ko: Tensor, kept: Tensor) -> Callable[[Batch], Tensor]:
        """A batch's inputs times a weight of the kept entries (b x t x o), float32.

        Entries that go meet zeros: taking the others out would take longer.
        """
        full = weight_ko.new_zeros(len(self.entries), weight_ko.shape[1])
        full[self.among(kept)] = weight_ko
        return lambda batch: self.stored[batch].to(weight_ko.device, torch.float32) @ full

    def weights(self, old: Tensor) -> Tensor:
        """Rows of a level-2 weight for these entries."""
        return old if len(old) == len(self.entries) else old[self.entries]


def collect(
    target: ModuleTarget, owner: int, keep: tuple[int, ...] | None = None
) -> tuple[Inputs, Moments, Moments | None]:
    """Run the pruned stream up to the module's level 2, for the inputs of all units or of those that stay.

    Of several processes, the owner has the moments of all rows.
    Beside what is fitted to: the moments to choose units by, which are the same ones unless the rows say
    otherwise, and for the same purpose those of the module's input. Neither is taken where units have been chosen.
    """
    state, module, stream, rows = target.state, target.module, target.state.stream, target.state.rows
    entries = inner_entries(module, tuple(range(module.units)) if keep is None else keep).to(stream.device)
    stored = state.arena.empty(rows, len(entries), stream.products)
    moments = Moments(len(entries), stream.width, centre=target.fits_bias, device=stream.device)
    scored, source, watched = moments, None, [module.sink]
    if keep is None and rows.scores is not None:
        scored = Moments(len(entries), stream.width, centre=moments.centre, device=stream.device)
    if keep is None and module.kind == "channels" and state.method.criteria.named(module.kind).inputs:
        source = Moments(stream.width, device=stream.device)
        watched.insert(0, module.source)
    for at in rows.batches():
        seen = state.inputs_of(module, target.pruned, at, *watched)
        x = seen[module.sink].flatten(0, -2)
        if keep is not None:
            x = x[:, entries]
        stored[at] = x
        wanted = target.of(at)
        x = wanted.scaled(x)
        # One entry where both are the same.
        with stream.rounded():
            for sums, weight in {scored: at.score, moments: at.weight}.items():
                if weight:
                    sums.update(x, wanted.target, weight, wanted.counts)
            if at.score and source is not None:
                source.update(seen[module.source].reshape(-1, stream.width), weight=at.score)
    for one in dict.fromkeys((moments, scored, source)):
        if one is not None:
            one.reduce(stream.team, owner)
    if not (moments.finite() and scored.finite()):
        what = {"heads": "attention", "channels": "feed-forward"}[module.kind]
        raise SecateurError(f"block {state.index}: the {what} module gives NaN or infinite activations")
    return Inputs(entries, stored, moments), scored, source
