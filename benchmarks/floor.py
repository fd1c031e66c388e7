"""Compare the CPU seconds of each effort of `prune` with the CPU seconds of the matrix products that it needs.

    python benchmarks/floor.py MODEL --calibration text.txt --out docs/results.md

The operations are counted while each step runs on a sample, as in a dry run (`products.py`). The floor is the time that
they take as plain matrix products on this machine: float32 products where the computation is exact, and products in the
blocks' dtype elsewhere. Products are timed in the same process before and after each run; the faster
of the two counts. The last column is the ratio to the floor with all products in float32. Everything runs on one
thread. CPU seconds include the survey. The second table lists the functions with the most time of their own at the
last effort.
"""

import argparse
import cProfile
import pstats
import tempfile
import time
from pathlib import Path

import torch

from products import operations, product_rate
from secateur import prune
from secateur.base.device import fast_dtype
from secateur.steps.options import EFFORTS, Options
from tables import put

LINES = 10
"""Number of functions in the profile."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=Options.samples)
    parser.add_argument("--blocks", help="first:end, for a part of a large model")
    parser.add_argument("--efforts", nargs="+", default=list(EFFORTS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shared = {"calibration": arguments.calibration, "samples": arguments.samples, "blocks": arguments.blocks}
    dtype = fast_dtype(torch.device("cpu"))
    lines = [
        "| effort | TFLOP of rounded products | of exact products | GFLOP/s, float32 | "
        f"{str(dtype).removeprefix('torch.')} | floor, s | CPU s | over floor | over float32 floor |",
        "|" + "---|" * 9,
    ]
    for effort in arguments.efforts:
        work, profile = operations(arguments.model, effort, **shared), cProfile.Profile()
        before = rates(dtype)
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            profile.runcall(prune, arguments.model, f"{folder}/out", effort=effort, **shared)
            seconds = time.process_time() - start
        exact, rounded = map(max, zip(before, rates(dtype), strict=True))
        floor, plain = work.seconds(rounded, exact), work.seconds(exact, exact)
        counts = f"{work.rounded / 1e12:.2f} | {work.exact / 1e12:.2f}"
        speeds = f"{exact / 1e9:.0f} | {rounded / 1e9:.0f}"
        ratios = f"{seconds / floor:.1f} | {seconds / plain:.1f}"
        lines.append(f"| `{effort}` | {counts} | {speeds} | {floor:.0f} | {seconds:.0f} | {ratios} |")
        print(lines[-1], flush=True)
    stats = pstats.Stats(profile)
    stats.sort_stats("tottime")
    lines += ["", f"| `{arguments.efforts[-1]}`, calls | s | function |", "|---|---|---|"]
    for function in stats.fcn_list[:LINES]:  # type: ignore[attr-defined]
        file, line, name = function
        calls, _, own, *_ = stats.stats[function]  # type: ignore[attr-defined]
        place = f"{'/'.join(Path(file).parts[-2:])}:{line} " if line else ""
        lines.append(f"| {calls:,} | {own:.1f} | `{place}{name}` |")
    print("\n".join(lines))
    if arguments.out:
        put(arguments.out, f"floor {Path(arguments.model).stem}", lines)


def rates(dtype: torch.dtype) -> tuple[float, float]:
    """Return the operations per second of float32 products, and of products in another dtype."""
    return product_rate(), product_rate(dtype=dtype)


if __name__ == "__main__":
    main()
