"""Next-token loss, computed from the output of the last block."""

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn.functional import cross_entropy

from secateur.model.arena import Activations
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream


def summed_loss(head: Callable[[Tensor], Tensor], ids: Tensor, hidden_td: Tensor) -> Tensor:
    """Return the negative log-likelihood of a row in nats, summed over all tokens but the first.

    Args:
        head: Function from hidden states to logits, from `BlockStream.head`.
        ids: Token ids of the row (t).
        hidden_td: Output of the last block (t x d).
    """
    logits = head(hidden_td[:-1])
    return cross_entropy(logits, ids[1:].to(logits.device), reduction="sum")


def mean_loss(
    stream: BlockStream, rows: Rows, group: int, hidden: Activations, norm: Mapping[str, Tensor] | None = None
) -> float:
    """Return the mean negative log-likelihood of one group of rows, in nats per token, over all processes.

    Args:
        stream: The model.
        rows: Rows of all processes.
        group: Index of the group.
        hidden: Output of the last block for this process's rows.
        norm: Values that replace parameters of the final norm, by their names in the model.
    """
    ids = stream.local_rows(rows).groups[group]
    losses, counts = [], []
    with stream.head() as head, stream.replaced(norm or {}):
        for place, row in enumerate(ids):
            losses.append(float(summed_loss(head, row, hidden.parts[group][place])))
            counts.append(len(row) - 1)
    return stream.processes.total(losses) / stream.processes.total(counts)
