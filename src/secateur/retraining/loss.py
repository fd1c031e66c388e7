"""Loss between a target distribution and the pruned model's next-token distribution, without logits of all tokens.

    loss = sum over targets i of p_i (ln p_i - ln q_i) + r (ln r - ln s),    r = 1 - sum p_i,    s = 1 - sum q_i

per token, in nats, with probabilities q of the pruned model and p of the targets: a few tokens, the likeliest of the
teacher, and the probability r of all other tokens together. With one target of probability 1 this is the cross-entropy
of a text. The gradient with respect to the logits is

    q_i - p_i for a target i,    q_j (1 - r / s) for any other token j

It is computed together with the loss, for some tokens at a time, so that logits of tokens x vocabulary never exist.

Shapes: n tokens, d residual width, v vocabulary size, k targets.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

LOGITS_AT_ONCE = 2**24
"""Most logits in memory at a time: 64 MiB in float32."""
IN_CACHE = 2**19
"""Logits of the rows on which the loss is computed at a time. They stay in the processor's cache, which makes it four
times as fast."""
LEAST = 1e-6
"""Least probability of all tokens that are not targets, so that its logarithm is finite."""

Head = Callable[[Tensor], Tensor]
"""Function from hidden states (n x d) to logits (n x v)."""


def distribution_loss(hidden: Tensor, head: Head, ids: Tensor, log_p: Tensor, vocabulary: int) -> Tensor:
    """Return the mean loss of tokens; it can be differentiated with respect to the hidden states only.

    Args:
        hidden: Hidden states after the final norm (n x d).
        head: Output layer, with all that the model does to its logits.
        ids: Target tokens of each position (n x k).
        log_p: Logarithms of the probabilities of the targets (n x k).
        vocabulary: Vocabulary size v.
    """
    # The parts are equal, because the product of a small last part takes as long as the product of a large part.
    parts = -(-len(hidden) // max(1, LOGITS_AT_ONCE // vocabulary))
    loss: Tensor = _DistributionLoss.apply(hidden, head, ids, log_p, -(-len(hidden) // parts))
    return loss


def losses_and_gradient(logits: Tensor, ids: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each token (n) and its gradient with respect to the logits (n x v).

    Args:
        logits: Logits in float32, which are overwritten (n x v).
        ids: Target tokens (n x k).
        log_p: Logarithms of their probabilities, in float32 (n x k).
    """
    logits.sub_(logits.amax(-1, keepdim=True))
    log_q = logits.gather(-1, ids)
    total = logits.exp_().sum(-1, keepdim=True)
    log_q -= total.log()
    p, q = log_p.exp(), log_q.exp()
    rest_p, rest_q = ((1 - some.sum(-1)).clamp_min(LEAST) for some in (p, q))
    # A text's tokens have probability 1, which leaves nothing for others.
    rest_p = torch.where(rest_p <= LEAST, 0.0, rest_p)
    losses = (p * (log_p - log_q)).sum(-1) + torch.xlogy(rest_p, rest_p / rest_q)
    gradient = logits.mul_((1 - rest_p / rest_q)[:, None] / total)
    return losses, gradient.scatter_(-1, ids, q - p)


class _DistributionLoss(torch.autograd.Function):
    """Mean loss of tokens, whose gradient is computed with it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, ids: Tensor, log_p: Tensor, step: int) -> Tensor:
        gradient, total = torch.empty_like(hidden), hidden.new_zeros((), dtype=torch.float32)
        for part, some_ids, some_log_p, into in _split(step, hidden, ids, log_p, gradient):
            with torch.enable_grad():
                logits = head(leaf := part.detach().requires_grad_())
            slope = torch.empty_like(logits)
            few = max(1, IN_CACHE // logits.shape[-1])
            for one, its_ids, its_log_p, out in _split(few, logits.detach(), some_ids, some_log_p, slope):
                # The network may need its logits for the backward pass, so a copy is overwritten.
                losses, found = losses_and_gradient(one.to(torch.float32, copy=True), its_ids, its_log_p.float())
                total += losses.sum()
                out.copy_(found)
            into.copy_(torch.autograd.grad(logits, leaf, slope)[0])
        ctx.save_for_backward(gradient.div_(len(hidden)))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer, None, None, None, None


def _split(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield parts of at most `size` rows of all tensors together."""
    yield from zip(*(tensor.split(size) for tensor in tensors), strict=True)
