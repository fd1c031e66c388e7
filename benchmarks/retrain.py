"""Measure a step of `secateur retrain` against the matrix products that it needs.

    python benchmarks/retrain.py PRUNED --ranks 0 16 --batch 8 --length 128

For each rank the script prints CPU seconds of a step, of the model's and of the adapters' matrix products alone
(forward and backward, in the same shapes and dtype, measured in the same run), their ratios, and the ten operations
that take the longest.
Run it on one thread (OMP_NUM_THREADS=1).
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from secateur.base.device import fast_dtype
from secateur.base.processes import Processes
from secateur.formats.folder import open_folder
from secateur.measure.loading import load
from secateur.model.arena import Activations
from secateur.retraining.adapters import adapted_layers
from secateur.retraining.student import Student
from secateur.retraining.targets import Targets
from tables import put

LIKELIEST = 64


def random_targets(rows: torch.Tensor, vocabulary: int) -> Targets:
    """Return targets of random tokens, in the shape of the teacher's."""
    ids = torch.randint(vocabulary, (*rows.shape, LIKELIEST))
    # Half of the probability is left for other tokens.
    log_p = torch.randn(ids.shape).log_softmax(-1) - torch.tensor(2.0).log()
    return Targets(rows, 0.0, (Activations([ids]), Activations([log_p])))


def cpu_seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Return the CPU seconds of the fastest of several runs after a first one."""
    run()
    found = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return min(found)


def product_seconds(network: Any, rank: int, tokens: int, dtype: torch.dtype) -> float:
    """Return the CPU seconds of all matrix products of a step, without adapters' own."""
    head = network.get_output_embeddings()
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    shapes = Counter((tuple(one.weight.shape), not rank and one is not head) for one in linear)
    total = 0.0
    for ((outputs, inputs), is_trained), count in shapes.items():
        x, g, w = (torch.randn(*shape).to(dtype) for shape in ((tokens, inputs), (tokens, outputs), (outputs, inputs)))
        products = [(x, w.T), (g, w), *([(g.T, x)] if is_trained else [])]
        total += count * sum(cpu_seconds(partial(torch.matmul, *factors)) for factors in products)
    return total


def adapter_seconds(network: Any, rank: int, tokens: int, dtype: torch.dtype) -> float:
    """Return the CPU seconds of the adapters' own matrix products in a step."""
    adapted = [network.get_submodule(name) for name in adapted_layers(network)] if rank else []
    total = 0.0
    for (outputs, inputs), count in Counter(tuple(one.weight.shape) for one in adapted).items():
        sizes = ((tokens, inputs), (tokens, outputs), (tokens, rank), (rank, inputs), (outputs, rank))
        x, g, u, a, b = (torch.randn(*size).to(dtype) for size in sizes)

        def products(x: Any = x, g: Any = g, u: Any = u, a: Any = a, b: Any = b) -> tuple[Any, ...]:
            # y = x A' B' and the gradients of B, of u = x A', of A and of x.
            return x @ a.T, u @ b.T, g.T @ u, g @ b, u.T @ x, u @ a

        total += count * cpu_seconds(products)
    return total


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 16])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    given = parser.parse_args()
    checkpoint, device = open_folder(given.model), torch.device("cpu")
    rows, profiles = [], []
    for rank in given.ranks:
        products = fast_dtype(device)
        network = load(checkpoint, products if rank else torch.float32, device)
        floor = product_seconds(network, rank, given.batch * given.length, products)
        own = adapter_seconds(network, rank, given.batch * given.length, products)
        student = Student(checkpoint, rank=rank, products=products, device=device, processes=Processes())
        student.rows = torch.randint(checkpoint.config.vocab_size, (given.batch, given.length))
        student.targets = random_targets(student.rows, checkpoint.config.vocab_size)
        optimizer = torch.optim.AdamW(student.trained().values(), lr=1e-6, fused=True)

        def step(student: Student = student, optimizer: torch.optim.Optimizer = optimizer) -> None:
            student(torch.arange(given.batch))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds = cpu_seconds(step)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            step()
        rows.append(
            f"| {rank} | {str(products)[6:]} | {seconds:.2f} | {floor:.2f} | {own:.2f} | {seconds / floor:.2f} | "
            f"{seconds / (floor + own):.2f} |"
        )
        profiles.append(f"rank {rank}\n{seen.key_averages().table(sort_by='self_cpu_time_total', row_limit=10)}")
    names = "| rank | products in | step, CPU s | model's products, CPU s | adapters' products, CPU s | step over the "
    table = [names + "model's products | step over all products |", "|" + "---|" * 7, *rows]
    print("\n".join(table), *profiles, sep="\n\n")
    if given.out is not None:
        put(given.out, "retrain", table)


if __name__ == "__main__":
    main()
