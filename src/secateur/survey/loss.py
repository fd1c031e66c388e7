"""How badly a stream behind the last block predicts its own tokens."""

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn.functional import cross_entropy

from secateur.model.arena import Activations
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream


def summed_loss(head: Callable[[Tensor], Tensor], ids: Tensor, hidden_td: Tensor) -> Tensor:
    """Negative log-likelihood, in nats, summed over the tokens that others predict.

    Args:
        head: from `BlockStream.head`.
        ids: token ids of one row (t).
        hidden_td: their activations behind the last block.
    """
    logits = head(hidden_td[:-1])
    return cross_entropy(logits, ids[1:].to(logits.device), reduction="sum")


def mean_loss(
    stream: BlockStream, rows: Rows, group: int, hidden: Activations, norm: Mapping[str, Tensor] | None = None
) -> float:
    """Negative log-likelihood, in nats per token, of one group's rows from the stream behind the last block.

    `hidden` is this process's share, and the result that of all rows. `norm` are other values for the final norm, by
    their names in the model.
    """
    ids = stream.own(rows).groups[group]
    total, count = 0.0, 0
    with stream.head() as head, stream.replaced(norm or {}):
        for place, row in enumerate(ids):
            total += float(summed_loss(head, row, hidden.parts[group][place]))
            count += len(row) - 1
    return stream.processes.total(total) / stream.processes.total(count)
