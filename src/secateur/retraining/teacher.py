"""The dense model as a teacher: whether it fits the pruned one, and the distance of the pruned model's outputs from it.

    KL(dense || pruned) + mean over blocks of ||h - h_dense||^2 / ||h_dense||^2

per token, where KL is between next-token distributions and h is the residual stream behind a block.
"""

from typing import Any

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.progress import Watcher
from secateur.model.checkpoint import Checkpoint, open_checkpoint


def open_teacher(checkpoint: Checkpoint, source: str, watcher: Watcher) -> Checkpoint:
    """Open the dense model.

    Raises:
        SecateurError: its vocabulary, width or depth is not the pruned model's.
    """
    with watcher.busy(f"Opening {source}"):
        teacher = open_checkpoint(source)
    for what in ("vocab_size", "hidden_size", "num_hidden_layers"):
        mine, dense = (getattr(one.config, what, None) for one in (checkpoint, teacher))
        if mine != dense:
            raise SecateurError(
                f"{source} has {what} {dense}, but {checkpoint.source} has {mine}: name what that was pruned from"
            )
    return teacher


def distance(found: Any, wanted: Any) -> Tensor:
    """Return a model's distance per token from another: of logits (b x t x v) and of hidden states (b x t x d)."""
    logs = wanted.logits.float().log_softmax(-1)
    divergence = (logs.exp() * (logs - found.logits.float().log_softmax(-1))).sum(-1).mean()
    # The first hidden states are the embeddings, which nothing changes.
    gaps = [
        (mine - dense).square().sum(-1).div(dense.square().sum(-1)).mean()
        for mine, dense in zip(found.hidden_states[1:], wanted.hidden_states[1:], strict=True)
    ]
    return divergence + torch.stack(gaps).mean()
