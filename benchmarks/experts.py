"""Compare the orders in which experts are removed, with and without the refit, by the rise of the loss.

    python benchmarks/experts.py MIXTURE --calibration TEXT --evaluate TEXT --shares 0.25 0.5

The table has one row for each method and share of removed experts. For each text it gives the rise of the loss over
the unpruned mixture (nats per token, mean over seeds with range) and the ratio to the rise of `reap` without a refit.
Every block keeps the same number of experts, and only experts are removed.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import BlockStream, calibration_rows, consecutive_rows, open_checkpoint
from secateur.fit.loop import refit
from secateur.fit.recovery import Method, recovery_of
from secateur.model.arena import Activations
from secateur.model.rows import Rows
from secateur.model.units.experts import EXPERTS
from secateur.plan.problem import Plan
from secateur.survey.loss import mean_loss

METHODS = {
    f"{order}{', refit' * fits}": (order, fits)
    for order in ("reap", "reroute", "frequency", "random")
    for fits in (False, True)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluate", required=True, nargs="+")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--ridge", type=float, default=0.3)
    parser.add_argument(
        "--input-steps",
        type=int,
        default=2,
        help="steps of the refit for input projections; 0: only output projections",
    )
    given = parser.parse_args()
    checkpoint = open_checkpoint(given.model)
    stream, tokenizer = BlockStream(checkpoint), checkpoint.tokenizer()
    how: dict[str, Any] = {"length": 128, "vocab_size": checkpoint.config.vocab_size}
    texts = [consecutive_rows(tokenizer, text, tokens=given.tokens, **how).ids for text in given.evaluate]
    found: dict[tuple[str, float], list[list[float]]] = {}
    for seed in given.seeds:
        text = calibration_rows(tokenizer, given.calibration, samples=given.samples, seed=seed, **how)
        rows = Rows.of(text).with_openings()
        for share in given.shares:
            for name in given.methods:
                order, fits = METHODS[name]
                steps = {"input_steps": given.input_steps} if fits else {}
                recovery = recovery_of("refit" if fits else "none", ridge=given.ridge, **steps)
                lost = nats(stream, rows, texts, share, Method(f"experts={order}", recovery, seed))
                found.setdefault((name, share), []).append(lost)
                print(f"seed {seed}, {share:.0%}, {name}: " + ", ".join(f"{value:.4f}" for value in lost), flush=True)
    names = [Path(text).stem for text in given.evaluate]
    head = ["method", "experts removed", *(part for name in names for part in (f"nats on {name}", "over reap's"))]
    print("\n| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for (name, share), values in found.items():
        print("| " + " | ".join([name, f"{share:.0%}", *cells(values, found.get(("reap", share)))]) + " |")


def cells(values: list[list[float]], reap: list[list[float]] | None) -> list[str]:
    """Return cells for each text: mean with range, and the ratio to the mean of `reap`."""
    result = []
    for place in range(len(values[0])):
        own = [one[place] for one in values]
        mean = sum(own) / len(own)
        result.append(f"{mean:.3f} ({min(own):.3f} to {max(own):.3f})")
        base = [one[place] for one in reap] if reap else []
        result.append(f"{mean / (sum(base) / len(base)):.2f}" if base else "")
    return result


def nats(stream: BlockStream, rows: Rows, texts: list[Tensor], share: float, method: Method) -> list[float]:
    """Return the rise of the loss on each text, in nats per token."""
    widths = {index: block.width for index, block in enumerate(stream.blocks)}
    fewer = {index: width | {EXPERTS: math.ceil(width.experts * (1 - share))} for index, width in widths.items()}
    plan = Plan(fewer, share, share)
    every, lost = rows.with_held_out(*texts), list[float]()

    def judge(dense: Activations, pruned: Activations) -> None:
        for group in range(len(rows.groups), len(every.groups)):
            before, after = (mean_loss(stream, every, group, hidden) for hidden in (dense, pruned))
            lost.append(after - before)

    for _ in refit(stream, plan, every, method=method, compare=judge):
        pass
    return lost


if __name__ == "__main__":
    with torch.inference_mode():
        main()
