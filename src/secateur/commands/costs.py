"""What a run costs, counted: floating-point operations, bytes in memory, and the speed of this machine's products.

n calibration tokens, p parameters of a block's matrices, d residual width, a inputs of a level-2 layer.
"""

import time
from collections.abc import Iterable

import torch

from secateur.model.structure import Block


def forward_flops(block: Block, tokens: int) -> float:
    """One forward of a block: 2 n p. The products inside the attention are left out, as they depend on length."""
    return 2.0 * tokens * block.parameters


def module_flops(inputs: int, width: int, tokens: int) -> float:
    """Gram n a^2, cross moment 2 n a d, factor a^3/3, inverse 2 a^3/3 and solve 2 a^2 d of one module."""
    return tokens * (inputs**2 + 2 * inputs * width) + inputs**3 + 2 * inputs**2 * width


def level1_flops(block: Block, width: int, tokens: int, steps: int) -> tuple[float, float]:
    """Level 1 of the feed-forward fitted along: operations in float32, and those that need not be.

    With m level-1 matrices J and its transpose take m + 1 products of 2 n a d each, one of the two for the right-hand
    side. In float32 are what the module gives now, and its new inputs with their Gram matrix.
    """
    module = block.feed_forward
    product, matrices = 2.0 * tokens * module.units * width, len(module.scored)
    exact = (2 * matrices + 1) * product + module_flops(module.units, width, tokens)
    return exact, (matrices + 1) * product * (2 * steps + 1)


def level1_bytes(blocks: Iterable[Block], width: int, tokens: int, itemsize: int) -> int:
    """What it stores on top of `memory_bytes`: the module's input and a factor for each level-1 matrix."""
    return max(tokens * (width + len(b.feed_forward.scored) * b.feed_forward.units) * itemsize for b in blocks)


def stream_flops(blocks: Iterable[Block], tokens: int) -> float:
    """The dense and the pruned stream: two forwards of the blocks."""
    return sum(2 * forward_flops(block, tokens) for block in blocks)


def solve_flops(blocks: Iterable[Block], width: int, tokens: int) -> float:
    """Each module's statistics and solve once."""
    return sum(module_flops(inputs, width, tokens) for inputs in _level2_inputs(blocks))


def survey_flops(blocks: list[Block], tokens: int, *, probed: int, probes: int) -> float:
    """One forward, each module's Gram matrix and inverse, and from each block on `probes` streams of `probed` tokens.

    A stream begins behind one of the block's two modules. The output layer and refits of what is probed are left out.
    """
    streams = sum(probes * (number + 0.5) * forward_flops(block, probed) for number, block in enumerate(blocks))
    grams = sum(tokens * inputs**2 + inputs**3 for inputs in _level2_inputs(blocks))
    return sum(forward_flops(block, tokens + probed) for block in blocks) + grams + streams


def survey_bytes(blocks: list[Block], width: int, tokens: int, *, probed: int, probes: int) -> int:
    """Its peak, on the scale of `memory_bytes`: nothing of a block is stored, but all probes' streams are."""
    streams = 4 * width * (tokens + probed * (1 + probes * len(blocks)))
    return memory_bytes(blocks, width, 0) + streams


def product_rate(
    device: torch.device | str = "cpu",
    size: int = 1536,
    repeats: int = 5,
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Floating-point operations per second of a matrix product here, the best of a few.

    The right factor is square; the left one has `rows`, by default as many as that.
    """
    square = torch.randn(size, size, device=device).to(dtype)
    left = square[: rows or size]
    best = 0.0
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (left @ square)[0, 0].item()
        best = max(best, 2 * len(left) * size**2 / (time.perf_counter() - start))
    return best


def memory_bytes(blocks: list[Block], width: int, tokens: int, *, others: int = 0, apart: bool = False) -> int:
    """Peak expected above what Python and its libraries take: a block twice, its largest solve, and the streams.

    Of `others`, the tokens of all fits but the one under way, both streams are there and nothing else.

    Where the rows that choose units stand `apart` from those that are fitted to, each has a Gram matrix and a cross
    moment. That takes no more operations: a token counts in one of the two.
    """
    block = max(blocks, key=lambda b: b.parameters)
    inputs = max(_level2_inputs([block]))
    solve = (4 + apart) * (inputs * inputs + inputs * width)
    streams = tokens * (6 * width + inputs) + others * 2 * width
    return 4 * (2 * block.parameters + solve + streams)


def gradient_flops(blocks: Iterable[Block], tokens: int) -> float:
    """The backward pass ahead of some criteria: two forwards of the blocks, and twice one for the gradients."""
    return sum(4 * forward_flops(block, tokens) for block in blocks)


def gradient_bytes(blocks: list[Block], width: int, tokens: int) -> int:
    """Its peak, on the scale of `memory_bytes`: a block, its gradients and their squares, and every block's input."""
    block = max(blocks, key=lambda b: b.parameters)
    return 4 * (3 * block.parameters + tokens * width * (len(blocks) + 1))


def _level2_inputs(blocks: Iterable[Block]) -> list[int]:
    """How many inputs each module's level-2 layer has."""
    return [module.units * module.size for block in blocks for module in (block.attention, block.feed_forward)]
