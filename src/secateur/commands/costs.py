"""What each step of `prune` computes and holds: floating-point operations, and bytes in memory.

n tokens, p parameters of a block's matrices, d residual width, a inputs of a level-2 layer, k channels, m level-1
matrices of a feed-forward module. Left out are the products inside the attention, which depend on the rows' length,
and whatever takes no matrix product.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from secateur.base.device import fast_dtype
from secateur.fit.level1 import SAMPLED
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.model.structure import Block, Depth2, Width


class Work(NamedTuple):
    """Operations, apart by what sets their speed, and the peak in memory."""

    forward: float = 0.0
    """In forwards of blocks."""
    quick: float = 0.0
    """In products that need not be float32."""
    exact: float = 0.0
    """In float32: products, factorisations, solves."""
    written: float = 0.0
    """In writing text token by token."""
    peak: int = 0
    """Bytes above what Python and its libraries take."""

    @classmethod
    def of(cls, parts: Iterable["Work"]) -> "Work":
        """The work of steps one after the other."""
        forward, quick, exact, written, peak = zip(cls(), *parts, strict=True)
        return cls(sum(forward), sum(quick), sum(exact), sum(written), max(peak))


def survey_work(stream: BlockStream, tokens: int, probed: int, probes: int) -> Work:
    """One forward, each module's Gram matrix and elimination, and from each module on `probes` streams of `probed`.

    An upper bound where only some blocks are chosen: fewer streams begin then. The output layer is left out.
    """
    blocks, width = stream.blocks, stream.width
    streams = sum(probes * (number + 0.5) * forward_flops(block, probed) for number, block in enumerate(blocks))
    held = 4 * width * (tokens + probed * (1 + probes * len(blocks)))
    return Work(
        forward=sum(forward_flops(block, tokens + probed) for block in blocks) + streams,
        quick=sum(gram_flops(a, 0, tokens) for a in _level2_inputs(blocks)),
        exact=sum(solve_flops(a, width) for a in _level2_inputs(blocks)),
        peak=memory_bytes(blocks, width, 0) + held,
    )


def rewriting_work(stream: BlockStream, tokens: int) -> Work:
    """One forward, and every logit."""
    logits = 2.0 * tokens * stream.width * stream.checkpoint.config.vocab_size
    return Work(forward=sum(forward_flops(block, tokens) for block in stream.blocks), quick=logits)


def fit_work(stream: BlockStream, rows: Rows, widths: Mapping[int, Width], level1: int) -> Work:
    """All fits: the dense stream once, a pruned one each, statistics and solves; level 1 by so many steps.

    `widths` are those of the pruned blocks.
    """
    blocks, width, beside = [stream.blocks[index] for index in widths], stream.width, rows.counted(False).tokens
    first, *others = (part.tokens for part in rows.fits())
    each = [first, *others]
    streams = rows.tokens + beside + sum(each)
    resting, apart = sum(others) + beside, rows.scores is not None
    fitted = [(stream.blocks[index], now.channels) for index, now in widths.items() if level1 and now.channels]
    parts = [level1_work(stream, block, kept, tokens, level1) for tokens in each for block, kept in fitted]
    return Work.of(
        [
            Work(
                forward=sum(forward_flops(block, streams) for block in stream.blocks),
                quick=sum(gram_flops(a, width, tokens) for tokens in each for a in _level2_inputs(blocks)),
                exact=len(each) * sum(solve_flops(a, width) for a in _level2_inputs(blocks)),
                peak=memory_bytes(blocks, width, first, others=resting, apart=apart)
                + max((part.peak for part in parts), default=0),
            ),
            *(part._replace(peak=0) for part in parts),
        ]
    )


def level1_work(stream: BlockStream, block: Block, kept: int, tokens: int, steps: int) -> Work:
    """Level 1 of the feed-forward fitted along, k channels kept; the peak is what it stores on top of the rest.

    J and its transpose take m + 1 products of 2 n k d each, one of the two for the right-hand side, and as many what is
    linearised. The new inputs are one more run of the block.
    """
    k, d, m = kept, stream.width, len(block.feed_forward.scored)
    product = 2.0 * tokens * k * d
    preconditioner = m * (k**3 / 3 + 2 * k**2 * min(tokens, SAMPLED)) + 2 * k**2 * d
    return Work(
        forward=forward_flops(block, tokens),
        quick=(m + 1) * product * (2 * steps + 2) + gram_flops(k, d, tokens),
        exact=preconditioner + steps * m * 2 * k * d * (k + d) + k**3 / 3 + 2 * k**2 * d,
        peak=tokens * (d + m * k) * fast_dtype(stream.device).itemsize,
    )


def gradient_work(stream: BlockStream, tokens: int) -> Work:
    """The backward pass ahead of some criteria: two forwards, and twice one for the gradients.

    In memory are a block, its gradients and their squares, and every block's input.
    """
    block = max(stream.blocks, key=lambda b: b.parameters)
    peak = 4 * (3 * block.parameters + tokens * stream.width * (len(stream.blocks) + 1))
    return Work(exact=sum(4 * forward_flops(block, tokens) for block in stream.blocks), peak=peak)


def forward_flops(block: Block, tokens: int) -> float:
    """One forward of a block: 2 n p."""
    return 2.0 * tokens * block.parameters


def gram_flops(inputs: int, width: int, tokens: int) -> float:
    """Gram matrix by panels, 1.2 n a^2, and cross moment, 2 n a d."""
    return tokens * (1.2 * inputs**2 + 2 * inputs * width)


def solve_flops(inputs: int, width: int) -> float:
    """Inverse, elimination and refit: 2 a^3 + 4 a^2 d, a little less where few units go."""
    return 2.0 * inputs**3 + 4 * inputs**2 * width


def memory_bytes(blocks: list[Block], width: int, tokens: int, *, others: int = 0, apart: bool = False) -> int:
    """A block twice, its largest solve, and the streams.

    Of `others`, the tokens of all fits but the one under way, both streams are there and nothing else. Where the rows
    that choose units stand `apart` from those that are fitted to, each has a Gram matrix and a cross moment.
    """
    block = max(blocks, key=lambda b: b.parameters)
    inputs = max(_level2_inputs([block]))
    solve = (4 + apart) * (inputs * inputs + inputs * width)
    streams = tokens * (6 * width + inputs) + others * 2 * width
    return torch.float32.itemsize * (2 * block.parameters + solve + streams)


def _level2_inputs(blocks: Iterable[Block]) -> list[int]:
    """How many inputs each module's level-2 layer has."""
    modules: list[Depth2] = [module for block in blocks for module in block.modules]
    return [module.units * module.size for module in modules]
