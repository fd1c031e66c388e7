"""The speed of this machine, measured with the model's first block and with plain matrix products."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.commands.module_costs import forward_flops
from secateur.commands.open_model import OpenRun
from secateur.commands.work import Work
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.text.self_calibration import rows_at_once
from secateur.text.sources import SELF

GENERATION_SIZE = 4096
"""Size of the matrix with which generation is measured: larger than the caches of a CPU, as a model is."""
NARROW = 0.6
"""Speed of factorisations and of updates of a few columns, as a share of the speed of a square product."""


class Speeds(NamedTuple):
    """Operations per second for each field of `Work`, in the same order."""

    forward: float
    rounded: float
    float32: float
    generated: float
    moved_bytes: float = float("inf")
    """Bytes per second."""

    def seconds(self, work: Work) -> float:
        """Return the seconds that the operations of some work take."""
        return sum(amount / speed for amount, speed in zip(work, self, strict=False))


def measure_speeds(run: OpenRun, rows: Tensor) -> Speeds:
    """Measure this machine.

    Args:
        run: The result of `open_model`.
        rows: Token ids to run through the first block (rows x length).
    """
    stream, batch = run.stream, min(rows_at_once(rows.shape[1]), len(rows))
    with stream.fast_products(), stream.rounded_sums():
        rounded = product_rate(stream.device)
    generated = float("inf")
    if SELF in run.options.sources:
        # Reading the weights limits the speed, so as many rows are multiplied as are generated together.
        generated = product_rate(stream.device, GENERATION_SIZE, rows=batch, dtype=stream.checkpoint.dtype)
    return Speeds(
        forward=forward_rate(stream, rows),
        rounded=rounded,
        float32=NARROW * product_rate(stream.device),
        generated=generated,
        moved_bytes=copy_rate(stream),
    )


def copy_rate(stream: BlockStream, rows: int = 8192, repeats: int = 3) -> float:
    """Return the bytes per second, read and written, of reordering rows as wide as the residual stream."""
    source = torch.ones(rows, stream.width, device=stream.device)
    order = torch.randperm(rows, device=stream.device)
    return _best_rate(2 * source.nbytes, lambda: source[order][0, 0].item(), repeats)


def forward_rate(stream: BlockStream, rows: Tensor, repeats: int = 3) -> float:
    """Return the operations per second of the first block on one batch of rows (rows x length)."""
    few = rows[: max(1, stream.batch_tokens // rows.shape[1])]
    batch = Rows((few,), (1.0,), batch_tokens=stream.batch_tokens)
    with stream.arena() as arena, stream.fast_products():
        hidden = stream.embed(batch, arena)
        with stream.filled(0) as layer:

            def run_block() -> None:
                for at in batch.batches():
                    stream.run_through(0, layer, hidden[at], at.group)

            return _best_rate(forward_flops(stream.blocks[0], batch.tokens), run_block, repeats)


def product_rate(
    device: torch.device | str = "cpu",
    size: int = 1536,
    repeats: int = 5,
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Return the floating-point operations per second of a matrix product.

    Args:
        device: Device on which to compute.
        size: Number of rows and columns of the right factor, and of columns of the left factor.
        repeats: Number of runs after a first one; the fastest run counts.
        rows: Number of rows of the left factor; `size` by default.
        dtype: Dtype of the two factors.
    """
    square = torch.randn(size, size, device=device).to(dtype)
    left = square[: rows or size]
    return _best_rate(2 * len(left) * size**2, lambda: (left @ square)[0, 0].item(), repeats)


def _best_rate(amount: float, run: Callable[[], object], repeats: int) -> float:
    """Return an amount of work divided by the seconds of the fastest of `repeats` + 1 runs."""
    best = 0.0
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        best = max(best, amount / (time.perf_counter() - start))
    return best
