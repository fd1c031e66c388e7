"""Dense model as a teacher: check that it fits the pruned one, and compute the distillation loss.

    loss = KL(dense || pruned) + mean over blocks of ||h - h_dense||^2 / ||h_dense||^2

per token. KL is between next-token distributions, and h is the residual stream after a block.

Shapes: b rows, t positions, v vocabulary size, d residual width.
"""

from typing import Any

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.progress import Watcher
from secateur.model.checkpoint import Checkpoint, open_checkpoint


def open_teacher(checkpoint: Checkpoint, source: str, watcher: Watcher) -> Checkpoint:
    """Open the dense model that `--teacher` names.

    Raises:
        SecateurError: its vocabulary size, hidden size or number of layers differs from the pruned model's.
    """
    with watcher.busy(f"Opening {source}"):
        teacher = open_checkpoint(source)
    for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
        pruned, dense = (getattr(one.config, key, None) for one in (checkpoint, teacher))
        if pruned != dense:
            raise SecateurError(
                f"{source} has {key} {dense}, but {checkpoint.source} has {pruned}; give --teacher the model that was "
                "pruned"
            )
    return teacher


def distillation_loss(pruned: Any, dense: Any) -> Tensor:
    """Return the mean loss per token, from model outputs with logits (b x t x v) and hidden states (b x t x d)."""
    log_btv = dense.logits.float().log_softmax(-1)
    divergence = (log_btv.exp() * (log_btv - pruned.logits.float().log_softmax(-1))).sum(-1).mean()
    # The first hidden states are the embeddings, which are not trained.
    gaps = [
        (h - h_dense).square().sum(-1).div(h_dense.square().sum(-1)).mean()
        for h, h_dense in zip(pruned.hidden_states[1:], dense.hidden_states[1:], strict=True)
    ]
    return divergence + torch.stack(gaps).mean()
