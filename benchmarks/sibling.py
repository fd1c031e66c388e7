"""Compare a large model that was pruned with the smaller dense model of its family.

    python benchmarks/sibling.py SMALL LARGE PRUNED ... --texts TEXTS --plot FILE

SMALL and LARGE are the dense models, and TEXTS is a folder that texts.py wrote. The table has, for each model:

- its parameters, in millions;
- seconds per token of decoding, in milliseconds: the median over the steps after a prompt of 64 tokens, one row;
- bits per byte of text (the base-2 logarithm of the perplexity per byte) on every kind of text, and the mean of the
  kinds that the calibration text `general` contains (seen) and of those that it does not contain (unseen);
- line: difference in bits per byte, on unseen kinds, to a dense model with as many parameters. The bits per byte of
  dense models are taken as linear in the logarithm of the parameters, through SMALL and LARGE. Below zero, the pruned
  model is the better one;
- worth: the parameters, in millions, of the dense model on this line with as many bits per byte.

Models run one after another, each alone in memory. Each is scored on as many tokens of its own tokenizer, so models
with different tokenizers are scored on stretches of slightly different lengths. `--plot FILE` plots the unseen kinds'
bits per byte against parameters, with the line, and against the time of a token. `--json FILE` keeps the figures, and
models that FILE holds are not measured again.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from basket import GROUPS, Basket
from secateur import open_checkpoint
from secateur.measure.loading import load
from secateur.measure.perplexity import perplexity
from secateur.measure.speed import speeds
from tables import put

PROMPT, NEW, REPEATS = 64, 64, 5


def measured(source: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return parameters, seconds per token of decoding, and bits per byte on each kind of text of one model."""
    checkpoint = open_checkpoint(source)
    basket = Basket(checkpoint, arguments.texts, arguments.tokens, checkpoint.max_positions or 1 << 20)
    network = load(checkpoint, getattr(torch, arguments.dtype), torch.device("cpu"), whole=True)
    return {
        "parameters": network.num_parameters(),
        "seconds": 1 / speeds([network], prompt=PROMPT, new=NEW, repeats=REPEATS)[0].decode,
        "bits": {kind: bits_per_byte(network, rows, basket.tokenizer) for kind, rows in basket.rows.items()},
    }


def bits_per_byte(network: Any, rows: torch.Tensor, tokenizer: Any) -> float:
    """Return the bits per byte of the text of all tokens except each row's first, which is not predicted."""
    score = perplexity(network, rows)
    return score.nll * score.tokens / math.log(2) / text_bytes(rows, tokenizer)


def text_bytes(rows: torch.Tensor, tokenizer: Any) -> int:
    """Return the bytes of the text of all tokens except each row's first."""
    return len("".join(tokenizer.batch_decode(rows[:, 1:], clean_up_tokenization_spaces=False)).encode())


class Line:
    """Straight line through two dense models: bits per byte against the logarithm of the parameters."""

    def __init__(self, small: dict[str, Any], large: dict[str, Any]):
        self.start = math.log(small["parameters"])
        self.bits = group_bits(small, "unseen")
        self.slope = (group_bits(large, "unseen") - self.bits) / (math.log(large["parameters"]) - self.start)

    def bits_at(self, parameters: float) -> float:
        """Return the bits per byte of a dense model of this size."""
        return self.bits + self.slope * (math.log(parameters) - self.start)

    def worth(self, bits: float) -> float:
        """Return the parameters of the dense model that has these bits per byte."""
        return math.exp(self.start + (bits - self.bits) / self.slope)


def group_bits(found: dict[str, Any], group: str) -> float:
    """Return the mean bits per byte on the kinds of a group: `seen` or `unseen`."""
    return mean(bits for kind, bits in found["bits"].items() if kind in GROUPS[group])


def table(kept: dict[str, dict[str, Any]], line: Line) -> list[str]:
    """Return the lines of the table; the first two models are the dense ones."""
    kinds = list(next(iter(kept.values()))["bits"])
    heads = ["model", "parameters (M)", "ms per token", *kinds, "seen", "unseen", "line", "worth (M)"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for source, found in kept.items():
        unseen = group_bits(found, "unseen")
        cells = [Path(source).name, f"{found['parameters'] / 1e6:.0f}", f"{1e3 * found['seconds']:.1f}"]
        cells += [f"{found['bits'][kind]:.3f}" for kind in kinds]
        cells += [f"{group_bits(found, 'seen'):.3f}", f"**{unseen:.3f}**"]
        cells += [f"{unseen - line.bits_at(found['parameters']):+.3f}", f"{line.worth(unseen) / 1e6:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot(kept: dict[str, dict[str, Any]], line: Line, path: Path) -> None:
    """Plot bits per byte on unseen kinds against parameters, with the line, and against seconds per token."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    kinds = [("dense", "C0", "s"), ("dense", "C0", "s")] + [("pruned", "C1", "o")] * (len(kept) - 2)
    axes = ("parameters", 1e6, "parameters (millions)"), ("seconds", 1e-3, "milliseconds per token")
    for panel, (key, unit, label) in zip(panels, axes, strict=True):
        for (source, found), (name, color, mark) in zip(kept.items(), kinds, strict=True):
            place = found[key] / unit, group_bits(found, "unseen")
            panel.plot(*place, mark, color=color, label=name)
            panel.annotate(Path(source).name, place, textcoords="offset points", xytext=(6, 4), fontsize=8)
        panel.set(xscale="log", xlabel=label)
        panel.margins(x=0.2)
        for axis in (panel.xaxis.set_major_formatter, panel.xaxis.set_minor_formatter):
            axis(StrMethodFormatter("{x:.0f}"))
        panel.grid(alpha=0.3, which="both")
    ends = [found["parameters"] for found in kept.values()][:2]
    panels[0].plot([end / 1e6 for end in ends], [line.bits_at(end) for end in ends], "--", color="C0", zorder=0)
    panels[0].set_ylabel("bits per byte, mean of the unseen kinds of text")
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    panels[0].legend(handles.values(), handles.keys())
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("small")
    parser.add_argument("large")
    parser.add_argument("pruned", nargs="*")
    parser.add_argument("--texts", type=Path, required=True, help="folder that texts.py wrote")
    parser.add_argument("--tokens", type=int, default=8192, help="number of tokens of each kind of text")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="file of all figures; models that it holds are not measured again")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    stored: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        stored = json.loads(arguments.json.read_text(encoding="utf-8"))
    sources = [arguments.small, arguments.large, *arguments.pruned]
    for source in sources:
        if source not in stored:
            stored[source] = measured(source, arguments)
            print(json.dumps({source: stored[source]}), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(stored), encoding="utf-8")
    kept = {source: stored[source] for source in sources}
    line = Line(stored[arguments.small], stored[arguments.large])
    lines = table(kept, line)
    print("\n".join(lines))
    if arguments.out:
        put(arguments.out, f"sibling {Path(arguments.large).name}", lines)
    if arguments.plot:
        plot(kept, line, arguments.plot)


if __name__ == "__main__":
    main()
