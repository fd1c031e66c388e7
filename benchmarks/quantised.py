"""Compare GGUF files of a model, quantised, pruned or both: size, speed and quality in llama.cpp.

    python benchmarks/quantised.py --dither MODEL FOLDER
    python benchmarks/quantised.py DENSE.gguf FILE.gguf ... --texts TEXTS

DENSE is the dense model in bf16, and TEXTS is a folder that texts.py wrote. The table has, for each file:

- its size in MB and its bits per weight;
- tokens per second of a prompt of 512 tokens, and of 32 tokens that follow, one row: medians over turns, in which all
  files are run one after the other;
- bits per byte: the mean over the kinds of text that the calibration text `general` does not contain;
- KL: the Kullback-Leibler divergence from DENSE's next-token distribution, in nats, a mean over the same tokens.

Weights in packages have been quantised to 4 bits already, so that quantising them again costs almost nothing.
`--dither` writes a folder of MODEL in which each weight is moved at random within its 4-bit cell (groups of 32). Such a
model stands for one that was never quantised.
"""

import argparse
import math
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from basket import GROUPS, Basket
from secateur import open_checkpoint
from secateur.measure.llama_cpp import LlamaCppFile, LlamaCppModel
from secateur.measure.loading import load, stored_bytes
from secateur.measure.speed import speeds
from sibling import text_bytes
from tables import put

GROUP, LEVELS = 32, 15
AT_ONCE = 4
"""Rows that run together."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--dither", action="store_true")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.dither:
        dither(*given.files)
    else:
        compare(given)


def compare(given: argparse.Namespace) -> None:
    """Print the table, and put it into the file that `--out` names."""
    files = [LlamaCppFile(one) for one in given.files]
    lines = ["| file | MB | bits per weight | prompt, tokens/s | new tokens/s | bits per byte | KL |", "|---" * 7 + "|"]
    networks = [LlamaCppModel(file) for file in files]
    found = speeds(networks, prompt=512, new=32, repeats=given.repeats)
    basket: Any = Basket(files[0], given.texts, given.tokens, 128, GROUPS["unseen"])  # type: ignore[arg-type]
    scores = [score(networks, rows, basket.tokenizer) for rows in basket.rows.values()]
    for file, network, speed, of_kinds in zip(files, networks, found, zip(*scores, strict=True), strict=True):
        size, weights = stored_bytes(file), sum(value.numel() for value in network.parameters())
        bits, divergence = map(mean, zip(*of_kinds, strict=True))
        sizes = f"{size / 1e6:,.1f} | {8 * size / weights:.2f} | {speed.prefill:,.0f} | {speed.decode:,.1f}"
        lines.append(f"| {Path(file.source).stem} | {sizes} | {bits:.4f} | {divergence:.4f} |")
    print("\n".join(lines))
    if given.out:
        put(given.out, "quantised", lines)


@torch.inference_mode()
def score(networks: list[Any], rows: torch.Tensor, tokenizer: Any) -> list[tuple[float, float]]:
    """Return, for each model, the bits per byte of a kind of text, and the divergence from the first in nats per token.

    The models read the same few rows one after the other, so that the logits of the first are computed only once.
    """
    nats, divergence = [0.0] * len(networks), [0.0] * len(networks)
    for ids in rows.split(AT_ONCE):
        dense = None
        for at, network in enumerate(networks):
            found = network(input_ids=ids).logits[:, :-1].log_softmax(-1)
            dense = found if dense is None else dense
            nats[at] -= float(found.gather(-1, ids[:, 1:, None]).sum())
            divergence[at] += float((dense.exp() * (dense - found)).sum())
    size, tokens = text_bytes(rows, tokenizer), rows[:, 1:].numel()
    return [(one / math.log(2) / size, other / tokens) for one, other in zip(nats, divergence, strict=True)]


def dither(model: str, out: str) -> None:
    """Write the model in bfloat16 with each weight moved at random within its cell of 4 bits."""
    checkpoint = open_checkpoint(model)
    network: Any = load(checkpoint, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            groups = layer.weight.data.unflatten(-1, (-1, GROUP))
            step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / LEVELS
            groups += step * (torch.rand(groups.shape, generator=generator) - 0.5)
    network.to(torch.bfloat16).save_pretrained(out)
    checkpoint.tokenizer().save_pretrained(out)


if __name__ == "__main__":
    main()
