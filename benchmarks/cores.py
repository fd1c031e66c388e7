"""Measure how a run of `prune` scales with threads, step by step, beside the scaling of plain matrix products.

    python benchmarks/cores.py MODEL --calibration text.txt --effort quick --blocks 10:16 --out docs/results.md

The same run is repeated with each number of threads. Plain products in the dtype of the blocks, of the size that layers
have, are timed in the same process before and after each run; the faster of the two counts. The last two columns follow
from the first and the last number of threads. With T_1 and T_n seconds of a step, and p the seconds of the same
products with n threads, divided by those with one thread, the serial part s of a step solves

    T_n = s + p (T_1 - s),

and 16 cores would take s + (T_1 - s) / 16, by Amdahl's rule. Seconds are seconds of the clock: the machine must have
nothing else to do.
"""

import argparse
import functools
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from products import product_rate
from secateur import prune
from secateur.base.device import fast_dtype
from tables import put

CORES = 16
STEPS = {
    "open": ["secateur.steps.prune:open_model"],
    "read weights": [
        "secateur.model.stream:BlockStream.block_tensors",
        "secateur.model.stream:BlockStream._read_block",
    ],
    "rows": ["secateur.steps.prune:draw_rows"],
    "survey": ["secateur.steps.prune:survey_model"],
    "probe": ["secateur.survey.probes:ProbeStreams.advance"],
    "plan": ["secateur.steps.prune:plan_widths"],
    "collect": ["secateur.fit.regression:Regression.collect"],
    "choose": ["secateur.fit.module:ModuleFit._choose"],
    "solve": ["secateur.fit.module:ModuleFit.solve"],
    "steps of the input projections": ["secateur.fit.module:ModuleFit._step_input_projections"],
    "store": ["secateur.fit.regression:BlockRegression.store"],
    "advance": ["secateur.fit.block_state:BlockState.advance", "secateur.fit.block_state:DenseBlock.run"],
    "write": ["secateur.write.shards:ShardWriter.add"],
}
"""Functions of each step. A function that runs inside another one counts for its own step alone."""
REST = "rest"


class Clock:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._running = [REST]
        self._since = time.perf_counter()

    def switch(self) -> None:
        """Add the seconds since the last switch to the step that runs."""
        now = time.perf_counter()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def timed(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose time counts for a step."""

        @functools.wraps(function)
        def called(*given: Any, **named: Any) -> Any:
            self.switch()
            self._running.append(step)
            try:
                return function(*given, **named)
            finally:
                self.switch()
                self._running.pop()

        return called


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Let a clock watch the functions of all steps."""
    before = []
    for step, places in STEPS.items():
        for place in places:
            module, _, path = place.partition(":")
            *parents, name = path.split(".")
            owner: Any = functools.reduce(getattr, parents, import_module(module))
            function = vars(owner)[name]
            is_method = isinstance(function, classmethod)
            timed = clock.timed(step, function.__func__ if is_method else function)
            setattr(owner, name, classmethod(timed) if is_method else timed)
            before.append((owner, name, function))
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--blocks", help="first:end, for a part of a large model")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, 2, os.cpu_count() or 1}))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    how = {name: getattr(given, name) for name in ("calibration", "samples", "effort", "blocks")}
    dtype = fast_dtype(torch.device("cpu"))
    found: dict[int, tuple[Mapping[str, float], float]] = {}
    for threads in given.threads:
        torch.set_num_threads(threads)
        clock, before = Clock(), product_rate(dtype=dtype)
        with tempfile.TemporaryDirectory() as folder, watched(clock):
            prune(given.model, f"{folder}/out", **how)
            clock.switch()
        found[threads] = clock.seconds, max(before, product_rate(dtype=dtype))
        print(threads, {step: round(value, 2) for step, value in clock.seconds.items()}, flush=True)
    lines = table(found)
    print("\n".join(lines))
    if given.out:
        put(given.out, f"cores {Path(given.model).stem} {given.effort}", lines)


def table(found: dict[int, tuple[Mapping[str, float], float]]) -> list[str]:
    """Return the lines of the table: a row for each step, for all together, and for the products."""
    counts = [*found]
    (first, rate), (last, fast) = found[counts[0]], found[counts[-1]]
    share = rate / fast
    lines = [
        "| step | " + " | ".join(f"threads: {count}, s" for count in counts) + f" | serial, s | {CORES} cores, s |",
        "|" + "---|" * (len(counts) + 3),
    ]
    total = [0.0, 0.0]
    for step in sorted(first, key=lambda step: -first[step]):
        serial = min(max((last[step] - share * first[step]) / (1 - share), 0.0), first[step]) if share < 1 else 0.0
        ends = serial, serial + (first[step] - serial) / CORES
        total = [sum(pair) for pair in zip(total, ends, strict=True)]
        times = " | ".join(f"{seconds[step]:.1f}" for seconds, _ in found.values())
        lines.append(f"| {step} | {times} | {ends[0]:.1f} | {ends[1]:.1f} |")
    times = " | ".join(f"{sum(seconds.values()):.1f}" for seconds, _ in found.values())
    lines.append(f"| together | {times} | {total[0]:.1f} | {total[1]:.1f} |")
    rates = " | ".join(f"{one / rate:.2f} times as fast" for _, one in found.values())
    lines.append(f"| plain products | {rates} | | |")
    ratio = sum(first.values()) / sum(last.values()) * share
    lines += [
        "",
        f"Scaling of the run over that of the products: {ratio:.2f}. Serial: {total[0] / sum(first.values()):.0%}.",
    ]
    return lines


if __name__ == "__main__":
    main()
