"""Compare pruning before quantising with quantising alone at equal bytes: perplexity over the original model's.

    python benchmarks/quantised.py MODEL --calibration general --evaluate a.txt --evaluate b.txt

In every row the blocks take as many bytes as the dense model's blocks in the type `--base`: a type with more bits per
weight is used on a model with fewer weights. The matrices of the blocks are quantised to a type of llama.cpp and back
by the gguf package, the embedding and the output layer to q8_0 and back. Numbers of channels are multiples of 32, the
size of a quantisation group.

Weights in packages have been quantised already, so that quantising them again costs almost nothing. With `--dither 4`
each weight is first moved at random within its 4-bit cell (groups of 32), and the resulting model is the original.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import nn

from secateur import open_checkpoint, prune
from secateur.measure.evaluation import scored_rows
from secateur.measure.loading import load
from secateur.measure.perplexity import perplexity
from tables import put

GROUP = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluate", action="append", required=True)
    parser.add_argument("--base", default="q4_0")
    parser.add_argument("--types", nargs="+", default=["q4_1", "q5_0", "q8_0"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--dither", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        source = given.model if not given.dither else dithered(given.model, given.dither, Path(place) / "dithered")
        lines = rows(source, given, Path(place) / "out")
    print("\n".join(lines))
    if given.out:
        put(given.out, "quantised", lines)


def rows(source: str, given: argparse.Namespace, out: Path) -> list[str]:
    dense = open_checkpoint(source)
    tokenizer = dense.tokenizer()
    texts = {Path(text).stem: scored_rows(dense, tokenizer, text, 128, given.tokens).ids for text in given.evaluate}

    def scores(model: Any) -> list[float]:
        return [perplexity(model, ids).perplexity for ids in texts.values()]

    whole = scores(opened(source))
    print("original: " + ", ".join(f"{value:.2f}" for value in whole), flush=True)
    names = ["type of the blocks", "sparsity", "MB of blocks", *texts]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name in (given.base, *given.types):
        share, model = 1 - bits(given.base) / bits(name), source
        if share:
            how = {"calibration": given.calibration, "effort": given.effort, "round": GROUP, "overwrite": True}
            share, model = prune(source, out, sparsity=share, **how).sparsity, str(out)
        network = opened(model)
        size = quantise(network, name)
        cells = [name, f"{share:.1%}", f"{size / 1e6:,.1f}"]
        cells += [f"{value / before:.3f}" for value, before in zip(scores(network), whole, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def opened(model: str) -> Any:
    return load(open_checkpoint(model), torch.float32, torch.device("cpu"))


def bits(name: str) -> float:
    entries, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    return 8 * size / entries


def quantise(model: nn.Module, name: str) -> float:
    """Quantise the weights in place; return the bytes of the blocks' matrices."""
    total = 0.0
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            inside = ".layers." in path
            kind = gguf.GGMLQuantizationType[(name if inside else "q8_0").upper()]
            found = gguf.quants.dequantize(gguf.quants.quantize(layer.weight.data.numpy(), kind), kind)
            layer.weight.data = torch.from_numpy(found)
            total += layer.weight.numel() * bits(name) / 8 if inside else 0.0
    return total


def dithered(model: str, width: int, out: Path) -> str:
    """Write the model with each weight moved at random within its cell of `width` bits; return the folder."""
    network = opened(model)
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            groups = layer.weight.data.unflatten(-1, (-1, GROUP))
            step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / (2**width - 1)
            groups += step * (torch.rand(groups.shape, generator=generator) - 0.5)
    network.save_pretrained(out)
    open_checkpoint(model).tokenizer().save_pretrained(out)
    return str(out)


if __name__ == "__main__":
    main()
