"""Time the experts of one block, run together and one at a time, against a plain matrix product of the same size.

    python benchmarks/forwards.py 30b-a3b --tokens 8192

Each row is one way to run all experts of a block on the same tokens and routes: CPU seconds on one thread, the ratio to
one matrix product with as many multiplications in the same dtype, and the memory of the experts' matrices.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from scale import SHAPES, make
from secateur import BlockStream, open_checkpoint
from secateur.checkpoints.expert_matrices import whole
from secateur.model.mixture import Mixture, Routes
from secateur.model.surgery import assign

REPEATS = 3


def seconds(make: Callable[[], object]) -> float:
    """Return the CPU seconds of the fastest of a few calls."""
    found = []
    for _ in range(REPEATS):
        start = time.process_time()
        make()
        found.append(time.process_time() - start)
    return min(found)


def one_at_a_time(mixture: Mixture, x_nd: Tensor, routes: Routes) -> Tensor:
    """Return the sum of all experts' outputs, each expert run on the tokens routed to it, as a fit runs them."""
    total = torch.zeros_like(x_nd)
    for expert in range(mixture.module.units):
        tokens, rows = mixture.gated_input(expert, x_nd, routes)
        total.index_add_(0, tokens, rows @ mixture[expert].weight)
    return total


def unfused(mixture: Mixture, dtype: torch.dtype) -> list[list[nn.Linear]]:
    """Return gate, up and down of each expert as separate linear layers."""
    layers = []
    for expert in range(mixture.module.units):
        gate_up, down = mixture.experts.gate_up_proj.read(expert), mixture.experts.down_proj.read(expert)
        parts = []
        for weight in (*gate_up.chunk(2), down):
            weight = weight.to(dtype).contiguous()
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            parts.append(layer)
        layers.append(parts)
    return layers


def run_unfused(layers: list[list[nn.Linear]], x_nd: Tensor, routes: Routes) -> Tensor:
    """Return the sum of all experts' outputs, computed by separate linear layers."""
    total = torch.zeros_like(x_nd)
    for expert, (gate, up, down) in enumerate(layers):
        tokens, gates = routes.of(expert)
        x = x_nd[tokens].to(gate.weight.dtype)
        total.index_add_(0, tokens, down(nn.functional.silu(gate(x)) * up(x)).float() * gates[:, None])
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=[name for name, shape in SHAPES.items() if shape.experts])
    parser.add_argument("--tokens", type=int, default=8192)
    given = parser.parse_args()
    torch.set_num_threads(1)
    shape = SHAPES[given.shape]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        make(shape, 1, Path(folder))
        stream = BlockStream(open_checkpoint(folder))
        original = stream.layers.get_submodule(f"0.{stream.blocks[0].modules[-1].output_projection.layer}")
        with stream.filled(0) as layer, stream.fast_products():
            mixture = Mixture(stream, layer, stream.blocks[0].modules[-1])
            x, every = torch.randn(given.tokens, shape.width), mixture.all_routed
            routes, products = mixture.route(x, every), stream.products_dtype
            pairs = given.tokens * shape.more["num_experts_per_tok"]
            floors = {}
            for dtype in {torch.float32, products}:
                rows, matrix = torch.randn(pairs, shape.width).to(dtype), torch.randn(3 * shape.channels, shape.width)
                floors[dtype] = seconds(partial(linear, rows, matrix.to(dtype)))
                del rows
            matrices = {name: getattr(mixture.experts, name) for name in ("gate_up_proj", "down_proj")}
            stored = sum(matrix.nbytes for one in matrices.values() for matrix in one)
            print(
                f"| {pairs:,} pairs; blocks multiply in {products} | CPU s | over one product | GB |\n|---|---|---|---|"
            )

            def row(name: str, dtype: torch.dtype, size: float, run: Callable[[], object]) -> None:
                spent = seconds(run)
                print(f"| {name} | {spent:.1f} | {spent / floors[dtype]:.2f} | {size / 1e9:.2f} |", flush=True)

            row("all experts of a filled block", products, stored, lambda: mixture.output(x[None], every))
            row("one at a time in a fit", products, stored, lambda: one_at_a_time(mixture, x, routes))
            for dtype in sorted({torch.float32, products}, key=str):
                layers = unfused(mixture, dtype)
                size = sum(part.weight.nbytes for parts in layers for part in parts)
                name = f"one at a time, separate linear layers, {str(dtype).removeprefix('torch.')}"
                row(name, dtype, size, partial(run_unfused, layers, x, routes))
                del layers
            for name, one in matrices.items():
                assign(original, name, whole(one).float())
            stream.model.set_experts_implementation("grouped_mm")
            row("together, grouped products, float32", torch.float32, 2 * stored, lambda: original(x, *routes))


if __name__ == "__main__":
    main()
