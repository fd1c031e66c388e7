"""Compare secateur with other pruning methods: perplexity over the dense model's at several sparsities.

    python benchmarks/quality.py MODEL --calibration a.txt --evaluate b.txt --evaluate c.txt --out docs/recipes/peers.md

All methods are scored on the same tokens. Each row of the table is printed as soon as it is there. `--out FILE` also
writes the table between the markers `<!-- quality NAME -->` and `<!-- /quality NAME -->` of a Markdown file. secateur
writes a folder, which is loaded and scored; the peers (`benchmarks/peers.py`) prune in memory, in float32.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from peers import PEERS, pruned_by
from secateur import BlockStream, Options, consecutive_rows, open_checkpoint, prune
from secateur.measure import perplexity
from secateur.measure.loading import load
from tables import put

OURS = {"secateur": "adaptive", "secateur, uniform": "uniform"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluate", action="append", required=True)
    parser.add_argument("--samples", type=int, default=Options.samples)
    parser.add_argument("--length", type=int, default=Options.length, help="of the calibration rows")
    parser.add_argument("--row", type=int, default=128, help="length of the scored rows")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sparsities", default="0.1,0.25,0.375,0.5")
    parser.add_argument("--methods", default=",".join([*OURS, *PEERS]).replace("secateur, uniform", "secateur uniform"))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--surveys", type=Path, help="a folder that keeps our surveys for a later run")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    names = [Path(source).stem for source in arguments.evaluate]
    methods = [name.replace("secateur uniform", "secateur, uniform") for name in arguments.methods.split(",")]
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    stream = BlockStream(open_checkpoint(arguments.model))
    score = scorer(arguments, stream)
    name = Path(arguments.model).stem
    table = Table(arguments, name, names, score(load(stream.checkpoint, torch.float32, torch.device("cpu"))))
    with tempfile.TemporaryDirectory() as folder:
        for sparsity in map(float, arguments.sparsities.split(",")):
            for method in methods:
                start = time.perf_counter()
                try:
                    found = [one(arguments, stream, score, method, sparsity, seed, Path(folder)) for seed in seeds]
                except ImportError as error:
                    print(f"{method}: not installed ({error})", flush=True)
                    continue
                seconds = (time.perf_counter() - start) / len(seeds)
                table.add(sparsity, method, found, seconds)


def one(
    arguments: argparse.Namespace,
    stream: BlockStream,
    score: Callable[[torch.nn.Module], list[float]],
    method: str,
    sparsity: float,
    seed: int,
    folder: Path,
) -> tuple[float, list[float]]:
    """Return the share of the blocks' parameters that one run removes, and its perplexities."""
    if method in OURS:
        out = folder / "pruned"
        summary = prune(
            arguments.model,
            out,
            sparsity=sparsity,
            widths=OURS[method],
            calibration=arguments.calibration,
            samples=arguments.samples,
            length=arguments.length,
            seed=seed,
            overwrite=True,
            survey=(arguments.surveys or folder) / f"survey-{seed}.json",
        )
        network = load(open_checkpoint(str(out)), torch.float32, torch.device("cpu"))
        return summary.sparsity, score(network)
    drawn: dict[str, int] = {"samples": arguments.samples, "length": arguments.length, "seed": seed}
    peer = pruned_by(method, stream, sparsity, arguments.calibration, **drawn)
    kept = peer.kept_parameters / sum(block.parameters for block in stream.blocks)
    return 1 - kept, score(peer.network)


def scorer(arguments: argparse.Namespace, stream: BlockStream) -> Callable[[torch.nn.Module], list[float]]:
    """Return a function from a network to its perplexity on each text."""
    tokenizer = stream.checkpoint.tokenizer()
    texts = [
        consecutive_rows(
            tokenizer,
            source,
            length=arguments.row,
            tokens=arguments.tokens,
            vocab_size=stream.checkpoint.config.vocab_size,
        ).ids
        for source in arguments.evaluate
    ]
    return lambda network: [perplexity(network, ids).perplexity for ids in texts]


class Table:
    """Table whose rows are printed and written to the file as soon as they are there."""

    def __init__(self, arguments: argparse.Namespace, name: str, texts: list[str], dense: list[float]):
        self.out, self.dense = arguments.out, dense
        self.name = f"{name} {Path(arguments.calibration).stem} {arguments.row}"
        said = ", ".join(f"{text} {value:.2f}" for text, value in zip(texts, dense, strict=True))
        self.lines = [
            f"{name}, calibrated on {arguments.samples} x {arguments.length} tokens of "
            f"{Path(arguments.calibration).name}, {arguments.tokens:,} tokens of each text in rows of "
            f"{arguments.row}, seeds {arguments.seeds}; torch "
            f"{torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads. Dense: {said}",
            "",
            "| sparsity | method | removed | " + " | ".join(f"{text}, over dense" for text in texts) + " | seconds |",
            "|---|---|---|" + "---|" * (len(texts) + 1),
        ]
        print("\n".join(self.lines), flush=True)

    def add(self, sparsity: float, method: str, found: list[tuple[float, list[float]]], seconds: float) -> None:
        """Add the row of one method at one sparsity, over all seeds."""
        removed = statistics.mean(share for share, _ in found)
        cells = []
        for at, dense in enumerate(self.dense):
            ratios = [values[at] / dense for _, values in found]
            spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
            cells.append(f"{statistics.mean(ratios):.2f}{spread}")
        self.lines.append(f"| {sparsity:.1%} | {method} | {removed:.1%} | " + " | ".join(cells) + f" | {seconds:.0f} |")
        print(self.lines[-1], flush=True)
        if self.out:
            put(self.out, f"quality {self.name}", self.lines)


if __name__ == "__main__":
    main()
