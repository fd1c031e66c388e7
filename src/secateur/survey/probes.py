"""Probes: the rise of the loss when one module alone is cut, measured at the model's output.

A probe starts at the block of its module, with the module's output at the probed width. From there, its residual stream
runs through the dense model. All probes advance together, so that each block is read once. At the end, the cost of the
cut is measured: the KL divergence of the logits from the dense model's logits, in nats per token.

Shapes: b rows, t positions, c columns of the stream between blocks (the residual width and, in some models, more),
d residual width, v vocabulary size, k tokens of the vocabulary, p probes.
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
"""Distance between the positions at which divergences are measured.

The output layer is expensive, and neighbouring positions give similar divergences.
"""
LIKELY_TOKENS, DRAWN_TOKENS = 256, 256
"""Numbers of tokens on which a divergence is computed, if the vocabulary is larger: the most likely ones, and a sample
of the others."""


@dataclass(frozen=True)
class Cut:
    """Cut of one module to a width, which a probe measures."""

    block: int
    """Index of the block."""
    module: PrunableModule
    """The module."""
    error: float
    """Rise of the module's error by the cut, in the units of `ErrorCurve.errors`."""
    kept: Tensor
    """Indices of the kept inputs of the output projection, or of the kept experts; empty if the module is removed."""
    weight_ao: Tensor
    """Refitted weight of the kept inputs (a x d), in the units of the residual stream; empty for experts."""


class ProbeStreams:
    """Residual streams of all probes on their way through the dense model."""

    def __init__(self, stream: BlockStream, rows: Rows, group: int, arena: Arena, checkpoint: PassCheckpoint):
        """Prepare for the probe rows; probes in the checkpoint are resumed.

        Args:
            stream: The dense model.
            rows: Rows of all processes.
            group: Index of the group of probe rows.
            arena: Memory for the streams.
            checkpoint: Checkpoint of the survey.
        """
        self.stream, self.group, self.arena = stream, group, arena
        own_rows = (stream.local_rows(rows).groups[group],)
        self.rows = Rows(own_rows, (0.0,), batch_tokens=stream.batch_tokens)
        self._count = len(rows.groups[group])
        self._first = stream.local_spans(rows)[group].start
        saved = checkpoint.value("probes", lambda: [asdict(probe) for probe in self.begun], [])
        self.begun = [Probe(**one) for one in saved]
        """Probe of each stream, whose divergence is not known yet."""
        self.hidden: list[Activations] = [arena.empty(self.rows, stream.columns) for _ in saved]
        """Activations of each stream."""

    def advance(self, index: int, layer: nn.Module) -> None:
        """Run all streams through a filled block."""
        for batch in self.rows.batches():
            # Several streams run together, because one alone is too short for fast matrix products.
            together = max(1, self.rows.batch_tokens // self.rows.ids(batch).numel())
            for start in range(0, len(self.hidden), together):
                streams = self.hidden[start : start + together]
                joined = torch.cat([hidden[batch] for hidden in streams])
                after = self.stream.run_through(index, layer, joined, self.group)
                for hidden, part in zip(streams, after.split(len(self.rows.ids(batch))), strict=True):
                    hidden[batch] = part

    def begin(self, layer: nn.Module, dense: Tensor, output: Tensor, cut: Cut) -> None:
        """Start a stream at the block of its module.

        Args:
            layer: The filled block.
            dense: Input of the block in the dense model (b x t x c).
            output: Output of the cut module (b x t x d).
            cut: The cut.
        """
        hidden = self.arena.empty(self.rows, self.stream.columns)
        for batch in self.rows.batches():
            replay = {cut.module: output[batch.rows]}
            hidden[batch] = self.stream.run_through(cut.block, layer, dense[batch.rows], self.group, replay=replay)
        self.hidden.append(hidden)
        self.begun.append(Probe(cut.block, cut.module.kind, cut.error, not len(cut.kept), float("nan")))

    def finish(self, dense: Tensor) -> list[Probe]:
        """Return all probes with their divergences, and free the streams.

        Args:
            dense: Output of the last block in the dense model (b x t x c).

        Raises:
            SecateurError: The model's logits are NaN or infinite.
        """
        row_sums = [torch.zeros(0, len(self.hidden), dtype=torch.float64)]
        with self.stream.head() as head:
            for row in self.stream.services.watcher.track(range(len(self.rows.groups[0])), "Probe"):
                # The seed depends on the row alone, so that the result is the same with any number of processes.
                generator = torch.Generator().manual_seed(self._first + row)
                parts = (dense, *(hidden.parts[0] for hidden in self.hidden))
                streams = torch.stack([part[row][POSITION_STRIDE - 1 :: POSITION_STRIDE] for part in parts])
                logits = head(streams[0])
                self._check_finite(logits)
                tokens, shares = sampled_tokens(logits, generator)
                found = []
                for place, (ids, weights) in enumerate(zip(tokens, shares, strict=True)):
                    with self.stream.fewer_logits(ids):
                        logits = head(streams[:, place])
                    found.append(divergences(logits[0], logits[1:], weights) / len(tokens))
                row_sums.append(torch.stack(found).sum(0, keepdim=True))
        totals = self.stream.processes.gather(torch.cat(row_sums)).sum(0)
        for hidden in self.hidden:
            self.arena.release(hidden)
        self._check_finite(totals)
        means = (totals / self._count).tolist()
        return [replace(probe, divergence=value) for probe, value in zip(self.begun, means, strict=True)]

    def _check_finite(self, values: Tensor) -> None:
        """Raise `SecateurError` if logits, or divergences of them, are NaN or infinite."""
        if not torch.isfinite(values).all():
            source = self.stream.checkpoint.source
            raise SecateurError(f"{source}: NaN or infinite logits: the last norm or the output layer is broken")


def sampled_tokens(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Select the tokens of the vocabulary on which distributions are compared.

    The `LIKELY_TOKENS` most likely tokens are selected, each with its probability as weight. `DRAWN_TOKENS` others are
    drawn by their probabilities and share the remaining probability equally. Means over the selected tokens are
    unbiased estimates of means over the distribution. A vocabulary with no more tokens is used as a whole.

    Args:
        logits: Logits of the dense model at some positions (t x v).
        generator: Random numbers for the draw.

    Returns:
        Token ids and their weights (both t x k); the weights of each position add up to 1.
    """
    vocabulary = logits.shape[-1]
    if vocabulary <= LIKELY_TOKENS + DRAWN_TOKENS:
        return torch.arange(vocabulary, device=logits.device).expand_as(logits), logits.double().softmax(-1)
    shares = logits.float().softmax(-1)
    likely = shares.topk(LIKELY_TOKENS, -1)
    rest = shares.scatter(-1, likely.indices, 0.0)
    # Where no probability is left, any token may be drawn, as its weight is zero.
    some = rest.cpu().clamp_min(torch.finfo(rest.dtype).tiny)
    drawn = torch.multinomial(some, DRAWN_TOKENS, replacement=True, generator=generator).to(rest.device)
    remaining = rest.double().sum(-1, keepdim=True)
    weights = torch.cat([likely.values.double(), (remaining / DRAWN_TOKENS).expand(-1, DRAWN_TOKENS)], -1)
    return torch.cat([likely.indices, drawn], -1), weights / weights.sum(-1, keepdim=True)


def divergences(dense: Tensor, others: Tensor, weights: Tensor) -> Tensor:
    """Return KL(dense || other) of several distributions, in nats (p), as float64 on the CPU.

    With Δ the difference of the two models' logits, KL(dense || other) = log E[exp Δ] - E[Δ], where E is the mean over
    the dense distribution.

    Args:
        dense: Dense model's logits of selected tokens (k).
        others: Logits of the other models (p x k).
        weights: Weights of the tokens in means over the dense distribution (k), float64, with sum 1.
    """
    difference = others.double() - dense.double()
    mean = difference @ weights
    # The mean is subtracted first, so that the remaining numbers are small and rounding errors as well.
    return torch.log1p(torch.expm1(difference - mean[:, None]) @ weights).cpu()
