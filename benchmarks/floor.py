"""How far `prune` is from what it cannot go below: two forwards of the blocks and each module's solve, once.

    python benchmarks/floor.py MODEL --calibration text.txt

The floor is counted in floating-point operations and turned into seconds by this machine's float32 matrix
product, measured in the same process before and after the run, at the better of the two.
"""

import argparse
import tempfile
import time
from pathlib import Path

from secateur import BlockStream, open_checkpoint, prune
from secateur.costs import floor_flops, product_rate
from secateur.options import Options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=Options.samples)
    parser.add_argument("--length", type=int, default=Options.length)
    parser.add_argument("--modules", default="heads,channels")
    arguments = parser.parse_args()

    checkpoint = open_checkpoint(arguments.model)
    stream = BlockStream(checkpoint)
    tokens = arguments.samples * arguments.length
    flops = floor_flops(stream.blocks, stream.width, tokens)
    before = product_rate()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        prune(
            arguments.model,
            Path(folder) / "out",
            calibration=arguments.calibration,
            samples=arguments.samples,
            length=arguments.length,
            modules=tuple(arguments.modules.split(",")),
        )
        seconds = time.perf_counter() - start
    rate = max(before, product_rate())
    print(f"{len(stream)} blocks, n = {tokens} tokens, d = {stream.width}")
    print("floor = sum over blocks of 2 * 2 n p, and over modules of n a^2 + 2 n a d + a^3/3 + 2 a^3/3 + 2 a^2 d")
    print(f"      = {flops:.3e} flops; the matrix product reaches {rate / 1e9:.0f} GFLOP/s ({before / 1e9:.0f} before)")
    print(f"floor {flops / rate:.1f} s, prune {seconds:.1f} s, ratio {seconds / (flops / rate):.2f}")


if __name__ == "__main__":
    main()
