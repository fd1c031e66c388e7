"""Speed of matrix products on this machine, and the operations of a run, from which the floor of its time follows."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from secateur.plan.plan import plan
from secateur.steps.draw_rows import draw_rows
from secateur.steps.dry_run import usage_by_effort
from secateur.steps.open_model import open_model


def product_rate(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1536, repeats: int = 5
) -> float:
    """Return the floating-point operations per second of a square product: the fastest of `repeats` + 1 runs."""
    square, best = torch.randn(size, size, device=device).to(dtype), 0.0
    for _ in range(repeats + 1):
        start = time.perf_counter()
        # Reading a value waits for the device.
        (square @ square)[0, 0].item()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


class Operations(NamedTuple):
    """Floating-point operations of matrix products and factorisations."""

    rounded: float
    """Operations whose factors may be rounded to bfloat16."""
    exact: float
    """Operations in float32 and float64."""

    def seconds(self, rounded: float, exact: float) -> float:
        """Return the seconds that these operations take at two speeds (operations per second)."""
        return self.rounded / rounded + self.exact / exact


def operations(model: str | Path, effort: str, **options: Any) -> Operations:
    """Return the operations of a run of `prune`: counted on a sample, as a dry run measures the time."""
    run = open_model(model, effort=effort, **options)
    rows, widths = draw_rows(run, dry=True), plan(run.request.problem, run.options.widths)
    with Counter() as counter:
        clocks: list[Callable[[], float]] = [lambda: counter.rounded, lambda: counter.exact]
        return Operations(*(usage_by_effort(run, rows, widths, [effort], clock)[effort].seconds for clock in clocks))


class Counter(TorchDispatchMode):
    """Counter of operations that run while it is open: those whose factors may be rounded, and exact ones."""

    rounded = exact = 0.0

    def total(self) -> float:
        """Return the number of all operations so far."""
        return self.rounded + self.exact

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := _COUNTS.get(func._overloadpacket)) is not None:
            number, factor = count(*args, **(kwargs or {}), out_val=result), args[0]
            if factor.dtype.itemsize < 4 or (factor.dtype == torch.float32 and _is_rounding(factor.device)):
                self.rounded += number
            else:
                self.exact += number
        return result


def _is_rounding(device: torch.device) -> bool:
    """Return whether float32 products are rounded now, as `secateur.base.device.reduced_precision_matmul` sets it."""
    backends: Any = torch.backends
    backend = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    return backend.fp32_precision in ("bf16", "tf32")


def _cholesky(matrix: torch.Tensor, *_: Any, **__: Any) -> float:
    return matrix.numel() * matrix.shape[-1] / 3


def _solve(right: torch.Tensor, factor: torch.Tensor, *_: Any, **__: Any) -> float:
    return 2 * right.numel() * factor.shape[-1]


def _solve_triangular(factor: torch.Tensor, right: torch.Tensor, *_: Any, **__: Any) -> float:
    return right.numel() * factor.shape[-1]


_ATEN = torch.ops.aten
_COUNTS: dict[Any, Callable[..., float]] = {
    **flop_registry,
    _ATEN.linalg_cholesky_ex: _cholesky,
    _ATEN.cholesky_solve: _solve,
    _ATEN.linalg_solve_triangular: _solve_triangular,
}
"""Numbers of operations of torch's functions."""
