"""Compare the CPU seconds of each effort of `prune` with the CPU seconds of the matrix products that it needs.

    python benchmarks/floor.py MODEL --calibration text.txt --out docs/results.md

The operations are those that a dry run counts (formulas: docstrings of `secateur/commands/costs.py`). The floor is the
time that they take as plain matrix products on this machine: float32 products where the computation is exact, and
products in the blocks' dtype elsewhere. Products are timed in the same process before and after each run; the faster
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

from secateur import prune
from secateur.commands.draw_rows import draw_rows
from secateur.commands.dry_run import work_by_effort
from secateur.commands.machine_speed import Speeds, product_rate
from secateur.commands.open_model import open_model
from secateur.commands.options import EFFORTS, Options
from secateur.plan.plan import plan
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
    run = open_model(arguments.model, **shared)
    rows = draw_rows(run, dry=True)
    works = work_by_effort(run, rows, plan(run.request.problem, run.options.widths))
    lines = [
        "| effort | TFLOP of forwards | of other products | of exact products | GFLOP/s, float32 | "
        f"{str(run.stream.fast_products_dtype).removeprefix('torch.')} | floor, s | CPU s | over floor | "
        "over float32 floor |",
        "|" + "---|" * 10,
    ]
    for effort in arguments.efforts:
        work, profile = works[effort], cProfile.Profile()
        before = rates(run.stream.fast_products_dtype)
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            profile.runcall(prune, arguments.model, f"{folder}/out", effort=effort, **shared)
            seconds = time.process_time() - start
        exact, quick = map(max, zip(before, rates(run.stream.fast_products_dtype), strict=True))
        floor = Speeds(forward=quick, rounded=quick, float32=exact, generated=exact).seconds(work)
        counts = " | ".join(f"{count / 1e12:.2f}" for count in (work.forward, work.rounded, work.float32))
        speeds = f"{exact / 1e9:.0f} | {quick / 1e9:.0f}"
        plain = Speeds(forward=exact, rounded=exact, float32=exact, generated=exact).seconds(work)
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
