"""How badly a stream behind the last block predicts its own tokens."""

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn.functional import cross_entropy

from secateur.model.arena import Activations
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream


def summed_loss(head: Callable[[Tensor, Tensor, int], Tensor], ids: Tensor, hidden_btd: Tensor) -> Tensor:
    """Negative log-likelihood, in nats, summed over the tokens that others predict.

    Args:
        head: from `BlockStream.head`.
        ids: token ids (b x t).
        hidden_btd: their activations behind the last block.
    """
    logits = head(ids, hidden_btd, 1)[:, :-1]
    targets = ids[:, 1:].to(logits.device)
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def mean_loss(
    stream: BlockStream, rows: Rows, group: int, hidden: Activations, norm: Mapping[str, Tensor] | None = None
) -> float:
    """Negative log-likelihood, in nats per token, of one group's rows from the stream behind the last block.

    `norm` are other values for the final norm, by their names in the model.
    """
    ids = rows.groups[group]
    total, count = 0.0, 0
    with stream.head() as head, stream.replaced(norm or {}):
        for row in range(len(ids)):
            at = slice(row, row + 1)
            total += float(summed_loss(head, ids[at], hidden.parts[group][at]))
            count += ids[at, 1:].numel()
    return total / count
