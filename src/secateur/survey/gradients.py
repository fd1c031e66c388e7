"""Gradients of the loss with respect to a dense model's weights, one block at a time.

The loss is the cross entropy of the next token, the mean over the calibration tokens. A forward pass keeps every
block's input (in files beyond a limit); the model's own head gives the loss and its gradient at the stream behind the
last block; then the blocks run once more, last one first, each under autograd, which turns the gradient behind a block
into that of its weights and of its input. This is what gradient checkpointing computes, with the weights read from disk
and their gradients used up block by block.

Shapes: b rows, t positions, d residual width, v vocabulary.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

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
    """Gradients with respect to the matrices of one block's two modules, by their names inside the block."""

    index: int
    weights: dict[str, Tensor]
    """The matrices themselves, float32; they go when the next block is asked for."""
    gradient: dict[str, Tensor]
    """Of the loss, in nats per token."""
    square: dict[str, Tensor]
    """Mean over rows of the squared gradient of a row's own loss; empty unless asked for."""


def gradient_scores(
    stream: BlockStream,
    rows: Tensor | Rows,
    criterion: str | Criteria,
    *,
    blocks: range | None = None,
) -> UnitScores:
    """Scores of a criterion that needs gradients; only these are kept, and no block's gradients.

    Args:
        rows: as for `gradients`.
        criterion: criteria, of which one at least is made from gradients.
    """
    found: dict[tuple[int, str], Tensor] = {}
    criteria = Criteria.of(criterion)
    squares = criteria.needs_squared_gradients
    for block in gradients(stream, rows, blocks=blocks, squares=squares):
        for module in stream.blocks[block.index].modules:
            # No backward pass is made through experts.
            if module.kind in SCORED_KINDS and (score := criteria.of_kind(module.kind).from_gradients) is not None:
                found[block.index, module.kind] = score(module, block.weights, block.gradient, block.square)
        # Else they would stay while the next block's gradients are taken.
        del block
    return found


def gradients(
    stream: BlockStream,
    rows: Tensor | Rows,
    *,
    blocks: range | None = None,
    squares: bool = False,
) -> Generator[BlockGradients, None, None]:
    """Yield the gradients of some blocks, last block first.

    Args:
        rows: calibration tokens (rows x length), or several groups of them; tokens of a group count by its weight.
            Groups of weight zero, and those of one token a row, which predict nothing, are left out.
        squares: also the squared gradients, for which rows run one by one.

    Raises:
        SecateurError: no row has a token to predict, or activations or gradients are NaN or infinite.
    """
    blocks = blocks if blocks is not None else range(len(stream))
    rows = stream.own(_predicting(Rows.of(rows)))
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
                    for at in rows.batches():
                        after[at] = stream.run_through(index, layer, hidden[at], at.group)
                    if index >= blocks.start:
                        inputs[index] = hidden
                    hidden = after
                    continue
                block = stream.blocks[index]
                wanted = [
                    name for module in block.modules if module.kind in SCORED_KINDS for name in scored_matrices(module)
                ]
                found = _through_block(
                    stream, index, layer, rows, inputs[index], hidden, wanted if index in blocks else (), squares
                )
                arena.release(inputs.pop(index))
                if index in blocks:
                    yield found
                # None of it stays while the next block runs.
                del found, layer


def _predicting(rows: Rows) -> Rows:
    """The groups in which tokens predict others."""
    pairs = [(g, w) for g, w in zip(rows.groups, rows.weights, strict=True) if w and len(g) and g.shape[1] > 1]
    if not pairs:
        raise SecateurError("gradients need rows of at least two tokens, of which the first predicts the second")
    return Rows(tuple(group for group, _ in pairs), tuple(weight for _, weight in pairs))


def _singles(rows: Rows) -> Iterator[Batch]:
    """Batches of one row each."""
    for index, (group, weight) in enumerate(zip(rows.groups, rows.weights, strict=True)):
        for row in range(len(group)):
            yield Batch(index, slice(row, row + 1), weight, weight)


def _predictions(stream: BlockStream, rows: Rows) -> float:
    """How many tokens are predicted in all processes, each counted by its weight."""
    return stream.processes.total(sum(at.weight * (rows.ids(at).shape[1] - 1) for at in _singles(rows)))


def _through_head(stream: BlockStream, rows: Rows, hidden: Activations) -> None:
    """Put the loss's gradient in the place of the stream behind the last block."""
    total = _predictions(stream, rows)
    with stream.head() as head, torch.enable_grad():
        # Row by row: the logits of one row are as large as the stream's batches.
        for at in _singles(rows):
            ids, last = rows.ids(at), hidden[at].to(stream.device).requires_grad_()
            loss = summed_loss(head, ids[0], last[0]) * (at.weight / total)
            (found,) = torch.autograd.grad(loss, last)
            _check(found, "the output layer")
            hidden[at] = found


def _through_block(
    stream: BlockStream,
    index: int,
    layer: nn.Module,
    rows: Rows,
    before: Activations,
    signal: Activations,
    wanted: Sequence[str],
    squares: bool,
) -> BlockGradients:
    """One block's gradients, from its input and the loss's gradient behind it.

    The gradient at the block's input takes the place of the one behind it.
    """
    weights = {name: layer.get_parameter(name).requires_grad_() for name in wanted}
    gradient = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
    square = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items() if squares}
    total, samples = _predictions(stream, rows), stream.processes.total(sum(at.weight for at in _singles(rows)))
    for at in _singles(rows) if squares and wanted else rows.batches():
        hidden = before[at].to(stream.device).requires_grad_()
        with torch.enable_grad():
            after = stream.run(index, layer, hidden, at.group)
        assert after is not None
        first, *others = torch.autograd.grad(after, [hidden, *weights.values()], signal[at].to(stream.device))
        _check(first, f"block {index}")
        signal[at] = first
        # From a row's part of the whole loss to the row's own loss, a mean over its tokens.
        own = total / (at.weight * (hidden.shape[1] - 1))
        for name, found in zip(weights, others, strict=True):
            gradient[name] += found
            if squares:
                square[name] += found.mul_(own).square_().mul_(at.weight / samples)
    stream.processes.all_reduce(*gradient.values(), *square.values())
    for name, weight in weights.items():
        _check(gradient[name], f"block {index}")
        weight.requires_grad_(False)
    return BlockGradients(index, {name: weight.data for name, weight in weights.items()}, gradient, square)


def _check(gradient: Tensor, where: str) -> None:
    if not torch.isfinite(gradient.sum()):
        raise SecateurError(f"{where}: the backward pass gives NaN or infinite gradients; are the weights intact?")
