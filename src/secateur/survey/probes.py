"""What the loss of a module costs at the model's output: streams in which one module alone was pruned.

A probe starts at its module's block, with the module's output as it would be at a probe width; from there on its
stream runs through the dense model. All probes advance together, so that each block is read once. At the end, the
Kullback-Leibler divergence of the logits from the dense model's says what that one cut costs, in nats per token.

Shapes: b rows, t positions, d residual width, v vocabulary.
"""

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from secateur.base.errors import SecateurError
from secateur.model.arena import Activations, Arena
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.model.structure import PrunableModule
from secateur.survey.curves import Probe

POSITION_STRIDE = 2
"""The divergence is taken at every second position: the output layer is dear, and neighbours tell the same."""
LIKELY_TOKENS, DRAWN_TOKENS = 256, 256
"""Tokens on which it is taken, of a large vocabulary: so many of the likeliest, and so many drawn from the others."""


@dataclass(frozen=True)
class Cut:
    """A module at a width to be probed."""

    block: int
    module: PrunableModule
    error: float
    """What the cut adds to the module's error, on the scale of its `ErrorCurve`."""
    kept: Tensor
    """Level-2 input entries that stay; none if the whole module goes."""
    weight_ao: Tensor
    """Their refitted weights, in residual units."""


class ProbeStreams:
    """Perturbed streams on their way through the model."""

    def __init__(self, stream: BlockStream, rows: Rows, group: int, arena: Arena, checkpoint: PassCheckpoint):
        """Prepare for one group of `rows`; probes that the checkpoint has begun get room for their streams."""
        self.stream, self.group, self.arena = stream, group, arena
        own = (stream.own(rows).groups[group],)
        self.rows = Rows(own, (1.0,), batch_tokens=stream.services.batch_tokens)
        self._count = len(rows.groups[group])
        self._first = stream.spans(rows)[group].start
        begun = checkpoint.value("probes", lambda: [asdict(probe) for probe in self.begun], [])
        self.begun = [Probe(**one) for one in begun]
        """One for each stream, its divergence still unknown."""
        self.hidden: list[Activations] = [arena.empty(self.rows, stream.columns) for _ in begun]

    def advance(self, index: int, layer: nn.Module) -> None:
        """Run all streams through a filled block."""
        # Several streams a batch: one alone is too short for fast products.
        together = max(1, self.rows.batch_tokens // max(1, self.rows.tokens))
        for start in range(0, len(self.hidden), together):
            some = self.hidden[start : start + together]
            for at in self.rows.batches():
                after = self.stream.run_through(index, layer, torch.cat([h[at] for h in some]), self.group)
                for hidden, part in zip(some, after.split(len(self.rows.ids(at))), strict=True):
                    hidden[at] = part

    def begin(self, layer: nn.Module, dense: Tensor, output: Tensor, cut: Cut) -> None:
        """Start a stream at a filled block.

        Args:
            dense: the block's input in the dense model (b x t x c).
            output: what the level 2 of the module that is cut yields there (b x t x d).
            cut: which cut it is.
        """
        hidden = self.arena.empty(self.rows, self.stream.columns)
        for at in self.rows.batches():
            replay = {cut.module: output[at.rows]}
            hidden[at] = self.stream.run_through(cut.block, layer, dense[at.rows], self.group, replay=replay)
        self.hidden.append(hidden)
        self.begun.append(Probe(cut.block, cut.module.kind, cut.error, not len(cut.kept), float("nan")))

    def finish(self, dense: Tensor) -> list[Probe]:
        """The divergences, from the dense stream behind the last block (b x t x c); the streams are given back."""
        totals = torch.zeros(len(self.hidden), dtype=torch.float64)
        with self.stream.head() as head:
            for row in self.stream.services.watcher.track(range(len(self.rows.groups[0])), "Price"):
                # Dice of its own: the same ones wherever the row is run.
                dice = torch.Generator().manual_seed(self._first + row)
                parts = (dense, *(hidden.parts[0] for hidden in self.hidden))
                streams = torch.stack([part[row][POSITION_STRIDE - 1 :: POSITION_STRIDE] for part in parts])
                tokens, shares = sampled_tokens(head(streams[0]), dice)
                for place, (some, weights) in enumerate(zip(tokens, shares, strict=True)):
                    with self.stream.fewer_logits(some):
                        logits = head(streams[:, place])
                    totals += divergences(logits[0], logits[1:], weights) / len(tokens)
        self.stream.processes.all_reduce(totals)
        for hidden in self.hidden:
            self.arena.release(hidden)
        if not torch.isfinite(totals).all():
            source = self.stream.checkpoint.source
            raise SecateurError(f"{source}: NaN or infinite logits: the last norm or the output layer is broken")
        found = (totals / self._count).tolist()
        return [replace(probe, divergence=value) for probe, value in zip(self.begun, found, strict=True)]


def sampled_tokens(logits: Tensor, dice: torch.Generator) -> tuple[Tensor, Tensor]:
    """The tokens on which distributions are compared at each of some positions, and what each counts (both t x k).

    The most probable ones count their probability (t x v logits). Others are drawn by theirs, and share what is left:
    every mean over a distribution comes out right on average. A vocabulary that is no larger is taken whole.
    """
    vocabulary = logits.shape[-1]
    if vocabulary <= LIKELY_TOKENS + DRAWN_TOKENS:
        return torch.arange(vocabulary, device=logits.device).expand_as(logits), logits.double().softmax(-1)
    shares = logits.float().softmax(-1)
    likely = shares.topk(LIKELY_TOKENS, -1)
    rest = shares.scatter(-1, likely.indices, 0.0)
    drawn = torch.multinomial(rest.cpu(), DRAWN_TOKENS, replacement=True, generator=dice).to(rest.device)
    left = rest.double().sum(-1, keepdim=True)
    counts = torch.cat([likely.values.double(), (left / DRAWN_TOKENS).expand(-1, DRAWN_TOKENS)], -1)
    return torch.cat([likely.indices, drawn], -1), counts / counts.sum(-1, keepdim=True)


def divergences(dense: Tensor, others: Tensor, weights: Tensor) -> Tensor:
    """KL(dense || other) of each of some distributions, in nats, float64, on the host.

    With Δ the difference of two models' logits, it is log E[exp Δ] - E[Δ] over the dense distribution.

    Args:
        dense: logits of some tokens (k).
        others: the same of the other distributions (p x k).
        weights: of the tokens in means over the dense distribution (k), float64, 1 in all.
    """
    difference = others.double() - dense.double()
    mean = difference @ weights
    # The mean is taken off first: what is left is small, and so is what rounding makes of it.
    return torch.log1p(torch.expm1(difference - mean[:, None]) @ weights).cpu()
