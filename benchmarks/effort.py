"""Measure what each effort costs and gains: CPU seconds against perplexity over the dense model's.

    python benchmarks/effort.py MODEL --calibration a.txt --evaluate b.txt --evaluate c.txt --efforts 1,0,text 1,2 2,8

An effort is the name of one (`quick`, `normal`, `best`), or a number of fits, a number of steps of the input
projections, and `text` where no rows are resampled, separated by commas (see `EFFORTS`). Each run includes its survey
and the writing of the folder, and uses one thread, so that waiting threads are not counted. The column "over floor" is
the ratio of CPU seconds to the seconds that `--tflop` operations take in float32 matrix products on this machine.
Products are timed in the same process before and after the run; the faster of the two counts. The table and `--plot`
show the mean over seeds with the smallest and the largest value. Runs that the file `--keep` holds are not repeated.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from products import product_rate
from secateur import prune
from secateur.measure.evaluation import evaluate
from secateur.steps.options import EFFORTS, Effort, Options
from tables import put


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluate", action="append", required=True)
    parser.add_argument("--efforts", nargs="+", default=list(EFFORTS))
    parser.add_argument("--samples", type=int, default=Options.samples)
    parser.add_argument("--sparsities", default="0.25,0.5")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument(
        "--tflop",
        type=float,
        default=9.7,
        help="operations (10^12) of two forward passes, Gram matrices and solves; default: SmolLM2-135M",
    )
    parser.add_argument("--keep", type=Path, default=Path("efforts.jsonl"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = [json.loads(line) for line in arguments.keep.read_text().splitlines()] if arguments.keep.exists() else []
    dense = evaluate(arguments.model, texts=arguments.evaluate, tokens=arguments.tokens).models[0].texts
    for sparsity in map(float, arguments.sparsities.split(",")):
        for effort in arguments.efforts:
            for seed in map(int, arguments.seeds.split(",")):
                place = {"effort": effort, "samples": arguments.samples, "sparsity": sparsity, "seed": seed}
                if any(run.items() >= place.items() for run in runs):
                    continue
                found = place | one(arguments, effort, sparsity, seed)
                found["ratios"] = [found["perplexity"][text] / dense[text].perplexity for text in dense]
                runs.append(found)
                with arguments.keep.open("a") as file:
                    file.write(json.dumps(found) + "\n")
                print(json.dumps(found), flush=True)
    lines = table(arguments, runs)
    print("\n".join(lines))
    if arguments.out:
        put(arguments.out, f"effort {Path(arguments.model).stem}", lines)
    if arguments.plot:
        plot(runs, arguments.plot)


def one(arguments: argparse.Namespace, effort: str, sparsity: float, seed: int) -> dict[str, Any]:
    """Return CPU seconds, their ratio to the products' seconds, and perplexities of one run."""
    name = effort
    if effort not in EFFORTS:
        fits, steps, *text = effort.split(",")
        # Options take only known names.
        name, EFFORTS["normal"] = "normal", Effort(int(fits), int(steps), resample=not text)
    how: dict[str, Any] = {"sparsity": sparsity, "seed": seed, "samples": arguments.samples, "effort": name}
    rates = [product_rate()]
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        prune(arguments.model, Path(folder) / "out", calibration=arguments.calibration, **how)
        seconds = time.process_time() - start
        rates.append(product_rate())
        texts = evaluate(f"{folder}/out", texts=arguments.evaluate, tokens=arguments.tokens).models[0].texts
    floor = 1e12 * arguments.tflop / max(rates)
    found = {text: score.perplexity for text, score in texts.items()}
    return {"seconds": seconds, "times": seconds / floor, "perplexity": found}


def table(arguments: argparse.Namespace, runs: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table: one row for each effort and sparsity."""
    names = [Path(text).stem for text in arguments.evaluate]
    lines = [
        "| sparsity | effort | rows | CPU seconds | over floor | " + " | ".join(names) + " |",
        "|" + "---|" * (5 + len(names)),
    ]
    for group in grouped(runs):
        seconds, times = ([run[key] for run in group] for key in ("seconds", "times"))
        cells = [spread([run["ratios"][at] for run in group]) for at in range(len(names))]
        first = group[0]
        lines.append(
            f"| {first['sparsity']:.0%} | `{first['effort']}` | {first['samples']} | {statistics.mean(seconds):.0f} | "
            f"{statistics.mean(times):.1f} | " + " | ".join(cells) + " |"
        )
    return lines


def grouped(runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return groups of runs that differ only in their seed, by sparsity and then by CPU seconds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["sparsity"], run["effort"], run["samples"]), []).append(run)
    return sorted(
        groups.values(), key=lambda group: (group[0]["sparsity"], statistics.mean(r["seconds"] for r in group))
    )


def spread(values: list[float]) -> str:
    """Format the mean, with the smallest and the largest of several values."""
    several = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{several}"


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Plot perplexity over dense against CPU seconds: one panel per sparsity, one mark per effort and text."""
    from matplotlib.figure import Figure

    sizes = sorted({run["sparsity"] for run in runs})
    figure = Figure(figsize=(6 * len(sizes), 4.5), dpi=150, layout="constrained")
    for panel, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for group in grouped([run for run in runs if run["sparsity"] == size]):
            seconds = statistics.mean(run["seconds"] for run in group)
            for at, mark in zip(range(len(group[0]["ratios"])), "os^v", strict=False):
                values = [run["ratios"][at] for run in group]
                low, high = statistics.mean(values) - min(values), max(values) - statistics.mean(values)
                panel.errorbar(seconds, statistics.mean(values), [[low], [high]], fmt=mark, capsize=2, color=f"C{at}")
            panel.annotate(group[0]["effort"], (seconds, statistics.mean(r["ratios"][0] for r in group)), rotation=30)
        panel.set_title(f"{size:.0%} of the blocks' parameters removed")
        panel.set_xlabel("CPU seconds")
        panel.set_ylabel("perplexity over dense")
        panel.set_xscale("log")
        panel.grid(alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    main()
