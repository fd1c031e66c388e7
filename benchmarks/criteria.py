"""Criteria and recoveries side by side: one model, one size, one calibration text, perplexity over dense.

    python benchmarks/criteria.py MODEL --calibration text.txt --evaluate a.txt --evaluate b.txt --out docs/results.md

All rows have the same width, which the default criterion chose, so that they differ in nothing but the choice
of units and the repair. Each row is printed as it comes; with --out, the table replaces the one between the markers
`<!-- criteria -->` and `<!-- /criteria -->` of that file.
"""

import argparse
import platform
import time
from pathlib import Path

import torch

from secateur import (
    BlockStream,
    Options,
    calibration_rows,
    consecutive_rows,
    open_checkpoint,
    plan,
    refit,
    slice,
    survey,
)
from secateur.activations import Rows
from secateur.choice import CRITERIA
from secateur.evaluate import perplexity
from secateur.evaluate.compare import load
from secateur.meters import parameter_meter
from secateur.recovery import Recovery
from secateur.steps.decide import survey_rows
from secateur.steps.plan import Wish
from secateur.steps.refit import Method
from secateur.surgery import narrow
from secateur.tokens import begins_with_bos
from tables import put

GRID = [(criterion, recovery, "after") for criterion in CRITERIA for recovery in ("refit", "none")]
GRID += [("second-moment", "paper", "after"), ("second-moment", "paper", "both"), ("second-moment", "paper", "before")]
GRID += [("surgeon", "paper", "after")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluate", action="append", required=True)
    parser.add_argument("--samples", type=int, default=Options.samples)
    parser.add_argument("--length", type=int, default=Options.length)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--ridge", type=float, default=Options.ridge)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    checkpoint = open_checkpoint(arguments.model)
    tokenizer, vocabulary = checkpoint.tokenizer(), checkpoint.config.vocab_size
    stream = BlockStream(checkpoint)
    text = calibration_rows(
        tokenizer,
        arguments.calibration,
        samples=arguments.samples,
        length=arguments.length,
        seed=0,
        vocab_size=vocabulary,
    )
    rows = Rows.of(text) if begins_with_bos(tokenizer) else Rows.of(text).with_openings()
    texts = [
        consecutive_rows(tokenizer, source, length=128, tokens=arguments.tokens, vocab_size=vocabulary)
        for source in arguments.evaluate
    ]
    network = load(checkpoint, torch.float32, torch.device("cpu"))
    dense = [perplexity(network, ids).perplexity for ids in texts]
    few, probe_rows = survey_rows(text)
    found = survey(stream, few, probe_rows=probe_rows, ridge=arguments.ridge)
    counted = parameter_meter(stream)
    wish = Wish(stream.blocks, range(len(stream)), parameters=counted, goal=arguments.sparsity, meter=counted)
    decided = plan(wish, "uniform", found)
    width = decided.widths[0]
    names = [Path(source).stem for source in arguments.evaluate]
    lines = [
        f"{Path(arguments.model).name}, {arguments.samples} x {arguments.length} tokens of "
        f"{Path(arguments.calibration).name}, {arguments.tokens:,} tokens of each text in rows of 128, ridge "
        f"{arguments.ridge}; every block {width.heads} heads, {width.groups} key/value heads, {width.channels} "
        f"channels ({decided.sparsity:.1%} of the blocks); torch {torch.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads. Dense: "
        + ", ".join(f"{n} {p:.2f}" for n, p in zip(names, dense, strict=True)),
        "",
        "| criterion | recovery | " + " | ".join(f"{name}, over dense" for name in names) + " | seconds |",
        "|---|---|" + "---|" * (len(names) + 1),
    ]
    print("\n".join(lines), flush=True)
    layers = network.get_submodule(stream.family.blocks)
    for criterion, recovery, when in GRID:
        start = time.perf_counter()
        method = Method(criterion, Recovery(recovery, when, arguments.ridge))
        for block in refit(stream, decided, rows, method=method):
            tensors = {name: tensor.float() for name, tensor in slice(stream, block).items()}
            narrow(layers[block.index], tensors, width)
        seconds = time.perf_counter() - start
        ratios = [perplexity(network, ids).perplexity / base for ids, base in zip(texts, dense, strict=True)]
        label = recovery if recovery != "paper" else f"paper, {when}"
        lines.append(f"| {criterion} | {label} | " + " | ".join(f"{r:.2f}" for r in ratios) + f" | {seconds:.0f} |")
        print(lines[-1], flush=True)
        if arguments.out:
            put(arguments.out, "criteria", lines)


if __name__ == "__main__":
    main()
