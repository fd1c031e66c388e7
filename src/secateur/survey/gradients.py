"""Gradients of the loss with respect to a dense model's weights, one block at a time.

The loss is the cross-entropy of the next token, averaged over the calibration tokens. The computation has three steps:

1. A forward pass stores the input of every block, in files if memory is short.
2. The model's head gives the loss, and its gradient with respect to the output of the last block.
3. The blocks run again under autograd, the last block first. Autograd turns the gradient with respect to a block's
   output into the gradients with respect to its weights and its input.

This is gradient checkpointing, except that weights are read from disk and gradients are consumed block by block.

Shapes: b rows, t positions, d residual width, v vocabulary.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from secateur.base.errors import SecateurError
from secateur.criteria.llm_pruner import scored_matrices
from secateur.criteria.registry import SCORED_KINDS, Criteria, UnitScores
from secateur.model.arena import Activations
from secateur.model.rows import Batch, Rows
from secateur.model.stream import BlockStream
from secateur.survey.loss import summed_loss


@dataclass(frozen=True)
class BlockGradients:
    """Gradients with respect to the weight matrices of one block's modules, by their names inside the block."""

    index: int
    """Index of the block."""
    weights: dict[str, Tensor]
    """Weight matrices, float32; valid until the next block is requested."""
    gradient: dict[str, Tensor]
    """Gradient of the loss, which is in nats per token."""
    square: dict[str, Tensor]
    """Squared gradient of the mean loss of a row, averaged over rows; empty unless requested."""


def gradient_scores(
    stream: BlockStream,
    rows: Tensor | Rows,
    criterion: str | Criteria,
    *,
    blocks: range | None = None,
) -> UnitScores:
    """Return the scores of criteria that need gradients; the gradients themselves are not kept.

    Args:
        stream: The dense model.
        rows: Calibration rows; see `gradients`.
        criterion: Criteria, of which at least one needs gradients.
        blocks: Indices of the blocks to score; by default all.
    """
    found: dict[tuple[int, str], Tensor] = {}
    criteria = Criteria.of(criterion)
    squares = any(criteria.of_kind(kind).squared_gradients for kind in SCORED_KINDS)
    for block in gradients(stream, rows, blocks=blocks, squares=squares):
        for module in stream.blocks[block.index].modules_left:
            # There is no backward pass through experts.
            if module.kind in SCORED_KINDS and (score := criteria.of_kind(module.kind).from_gradients) is not None:
                found[block.index, module.kind] = score(module, block.weights, block.gradient, block.square)
        # Otherwise the weights would stay in memory while the next block's gradients are computed.
        del block
    return found


def gradients(
    stream: BlockStream,
    rows: Tensor | Rows,
    *,
    blocks: range | None = None,
    squares: bool = False,
) -> Generator[BlockGradients, None, None]:
    """Yield the gradients of some blocks, the last block first.

    Args:
        stream: The dense model.
        rows: Calibration tokens (rows x length), or several groups of them. Groups with weight zero, and groups with
            one token per row, are left out.
        blocks: Indices of the blocks; by default all.
        squares: Whether to compute squared gradients as well, for which rows run one by one.

    Raises:
        SecateurError: No row has a token to predict, or activations or gradients are NaN or infinite.
    """
    blocks = blocks if blocks is not None else range(len(stream))
    rows = stream.local_rows(_predicting(Rows.of(rows)))
    count = len(stream)
    with stream.arena() as arena:
        hidden = stream.embed(rows, arena)
        inputs: dict[int, Activations] = {}
        order = [*range(count), *reversed(range(blocks.start, count))]
        for step, index in enumerate(stream.services.watcher.track(order, "Gradients")):
            if step == count:
                _through_head(stream, rows, hidden)
            with stream.filled(index) as layer:
                if step < count:
                    after = arena.empty(rows, stream.columns) if index >= blocks.start else hidden
                    for batch in rows.batches():
                        after[batch] = stream.run_through(index, layer, hidden[batch], batch.group)
                    if index >= blocks.start:
                        inputs[index] = hidden
                    hidden = after
                    continue
                block = stream.blocks[index]
                scored = [module for module in block.modules_left if module.kind in SCORED_KINDS]
                wanted = [name for module in scored for name in scored_matrices(module)]
                found = _through_block(
                    stream, index, layer, rows, inputs[index], hidden, wanted if index in blocks else (), squares
                )
                arena.release(inputs.pop(index))
                if index in blocks:
                    yield found
                # Free the gradients and weights before the next block runs.
                del found, layer


def _predicting(rows: Rows) -> Rows:
    """Return the groups of rows that have a weight and at least two tokens per row."""
    pairs = [(g, w) for g, w in zip(rows.groups, rows.weights, strict=True) if w and len(g) and g.shape[1] > 1]
    if not pairs:
        raise SecateurError("gradients need rows of at least two tokens; use a larger --length")
    return Rows(tuple(group for group, _ in pairs), tuple(weight for _, weight in pairs))


def _singles(rows: Rows) -> Iterator[Batch]:
    """Yield batches of one row each."""
    return replace(rows, batch_tokens=1).batches()


def _predictions(stream: BlockStream, rows: Rows) -> float:
    """Return the number of predicted tokens in all processes, weighted by their token weights."""
    return stream.processes.total(batch.weight * (rows.ids(batch).shape[1] - 1) for batch in _singles(rows))


def _through_head(stream: BlockStream, rows: Rows, hidden: Activations) -> None:
    """Replace the output of the last block by the gradient of the loss with respect to it."""
    total = _predictions(stream, rows)
    with stream.head() as head, torch.enable_grad():
        # One row at a time, because the logits of one row are as large as a whole batch of the stream.
        for batch in _singles(rows):
            ids, last = rows.ids(batch), hidden[batch].to(stream.device).requires_grad_()
            loss = summed_loss(head, ids[0], last[0]) * (batch.weight / total)
            (found,) = torch.autograd.grad(loss, last)
            _check_finite(found, "the output layer")
            hidden[batch] = found


def _through_block(
    stream: BlockStream,
    index: int,
    layer: nn.Module,
    rows: Rows,
    before: Activations,
    output_gradient: Activations,
    wanted: Sequence[str],
    squares: bool,
) -> BlockGradients:
    """Return the gradients of one block, and replace `output_gradient` by the gradient at the block's input.

    Args:
        stream: The dense model.
        index: Index of the block.
        layer: The filled block.
        rows: Calibration rows.
        before: Input of the block.
        output_gradient: Gradient of the loss with respect to the block's output; overwritten.
        wanted: Names of the weights whose gradients are returned.
        squares: Whether squared gradients are returned as well.
    """
    weights = {name: layer.get_parameter(name).requires_grad_() for name in wanted}
    gradient_sums, square_sums = (
        [torch.zeros_like(weight, dtype=torch.float64, requires_grad=False) for weight in weights.values() if is_asked]
        for is_asked in (True, squares)
    )
    total, samples = _predictions(stream, rows), stream.processes.total(batch.weight for batch in _singles(rows))
    for batch in _singles(rows) if squares and wanted else rows.batches():
        hidden = before[batch].to(stream.device).requires_grad_()
        with torch.enable_grad():
            after = stream.run(index, layer, hidden, batch.group)
        assert after is not None
        first, *others = torch.autograd.grad(
            after, [hidden, *weights.values()], output_gradient[batch].to(stream.device)
        )
        _check_finite(first, f"block {index}")
        output_gradient[batch] = first
        # Factor from a row's share of the loss to the mean loss of the row's tokens.
        to_row_loss = total / (batch.weight * (hidden.shape[1] - 1))
        for place, found in enumerate(others):
            gradient_sums[place] += found
            if squares:
                square_sums[place] += found.mul_(to_row_loss).square_().mul_(batch.weight / samples)
    gradient, square = (
        dict(zip(weights, stream.processes.total_tensors(*sums), strict=False)) for sums in (gradient_sums, square_sums)
    )
    for name, weight in weights.items():
        _check_finite(gradient[name], f"block {index}")
        weight.requires_grad_(False)
    return BlockGradients(index, {name: weight.data for name, weight in weights.items()}, gradient, square)


def _check_finite(gradient: Tensor, where: str) -> None:
    """Raise `SecateurError` if a gradient is NaN or infinite; `where` names the part of the model."""
    if not torch.isfinite(gradient.sum()):
        raise SecateurError(f"{where}: the backward pass gives NaN or infinite gradients; check the weights")
