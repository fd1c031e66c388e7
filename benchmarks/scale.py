"""Measure time and memory of `prune` on random models of several sizes.

    python benchmarks/scale.py 7b --blocks 2 4 8 --samples 32 --limit 6GiB
    python benchmarks/scale.py 0.1b 1b --blocks 2 4 --samples 32 64
    python benchmarks/scale.py 1b --processes 1 2 --threads 2 1
    python benchmarks/scale.py 671b-a37b --blocks 1 --experts 32 --samples 16 --effort quick

The script writes each model tensor by tensor and prunes it in new processes. A row has wall and CPU seconds, the ratio
of CPU seconds to the floor (time of the matrix products that are needed, see `floor.py`), the hours that a model of
full depth would take at the same time per block, the peak resident set, and the bytes sent between processes.
The last lines are the exponents with which the seconds and the products grow. `--limit` is passed on as `--memory`;
the processes also run in a control group of that size, where one can be made.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from floor import rates
from products import operations
from secateur.base.device import fast_dtype
from secateur.base.memory import LIMITS, parse_memory
from secateur.families.registry import experts_of
from secateur.write.shards import ShardWriter
from tables import put

VOCABULARY = 32_000


class Shape(NamedTuple):
    """Sizes of a model."""

    width: int
    channels: int
    """Width of the feed-forward, or of each expert."""
    heads: int
    groups: int
    depth: int
    experts: int = 0
    family: str = "llama"
    more: dict[str, Any] = {}  # noqa: RUF012 (not changed)
    """Further keys of the config."""

    def config(self, blocks: int) -> Any:
        """Return the config of a model with some number of blocks."""
        keys: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": self.width, "num_hidden_layers": blocks}
        keys |= {"num_attention_heads": self.heads, "num_key_value_heads": self.groups, **self.more}
        keys |= {"max_position_embeddings": 4096, "tie_word_embeddings": True, "dtype": torch.bfloat16}
        if not self.experts:
            return AutoConfig.for_model(self.family, **keys, intermediate_size=self.channels)
        config = AutoConfig.for_model(self.family, **keys, moe_intermediate_size=self.channels)
        experts = experts_of(config)
        assert experts is not None
        setattr(config, experts.number, self.experts)
        return config


_QWEN = {"head_dim": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
_DEEPSEEK = {"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 0}
SHAPES = {
    "0.1b": Shape(576, 1536, 9, 3, 30),
    "1b": Shape(2048, 8192, 32, 8, 16),
    "7b": Shape(4096, 11_008, 32, 32, 32),
    "8b": Shape(4096, 14_336, 32, 8, 32),
    "70b": Shape(8192, 28_672, 64, 8, 80),
    "30b-a3b": Shape(2048, 768, 32, 4, 48, 128, "qwen3_moe", _QWEN),
    "235b-a22b": Shape(4096, 1536, 64, 4, 94, 128, "qwen3_moe", _QWEN),
    "671b-a37b": Shape(7168, 2048, 128, 128, 61, 256, "deepseek_v3", _DEEPSEEK),
}


def make(shape: Shape, blocks: int, folder: Path) -> None:
    """Write a model of random bfloat16 weights, with one tensor in memory at a time."""
    config = shape.config(blocks)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    writer, dice = ShardWriter(folder), torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        for stored, size in stored_sizes(name, tuple(tensor.shape)):
            # The weights of norms are vectors.
            values = torch.randn(size, generator=dice).mul_(0.02) if len(size) > 1 else torch.ones(size)
            writer.add(stored, values.bfloat16())
    writer.close()


def stored_sizes(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of the tensors in which checkpoints store a parameter: experts are stored one by one."""
    owner, _, leaf = name.rpartition(".")
    if name == "lm_head.weight":
        return
    if not owner.endswith(".experts"):
        yield name, shape
        return
    parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
    for expert, part in product(range(shape[0]), parts):
        yield f"{owner}.{expert}.{part}.weight", (shape[1] // len(parts), shape[2])


def bounded(limit: int) -> Path | None:
    """Return the file for process ids of a new control group of `limit` bytes; None where none can be made."""
    for root, file, *_ in LIMITS.values():
        group = root / f"secateur-{os.getpid()}"
        with suppress(OSError):
            group.mkdir(exist_ok=True)
            if (group / file).exists():
                (group / file).write_text(str(limit))
                return group / "cgroup.procs"
            # This is an ordinary folder: the system has its control groups elsewhere.
            group.rmdir()
    return None


class Measured(NamedTuple):
    """Wall seconds, CPU seconds and memory of a process and its children."""

    wall: float
    cpu: float
    peak: int
    """Peak resident set of the largest process, in bytes."""


def measured(command: list[str], group: Path | None, threads: int) -> Measured:
    """Run a command, inside the control group where one is given."""

    def enter() -> None:
        if group is not None:
            group.write_text(str(os.getpid()))

    with tempfile.TemporaryFile("w+") as said:
        start, environment = time.perf_counter(), os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, preexec_fn=enter, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        if status:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read()}")
    return Measured(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


class Case(NamedTuple):
    """Values that vary from row to row."""

    shape: str
    blocks: int
    samples: int
    team: tuple[int, int]
    """Number of processes, and of threads of each."""

    @property
    def sizes(self) -> dict[str, float]:
        """Sizes against which the growth of seconds is fitted."""
        return {"tokens": self.samples, "depth": self.blocks, "width": SHAPES[self.shape].width}


def carried_out(
    case: Case, experts: int | None, effort: str, limit: str | None, group: Path | None, where: Path | None
) -> tuple[Any, ...]:
    """Return the measurement of a case, its floor in seconds, and the bytes sent between processes."""
    with tempfile.TemporaryDirectory(dir=where) as folder:
        model, out = Path(folder) / "model", Path(folder) / "out"
        model.mkdir()
        make(
            SHAPES[case.shape] if experts is None else SHAPES[case.shape]._replace(experts=experts), case.blocks, model
        )
        asked: dict[str, Any] = {"calibration": "random", "samples": case.samples, "effort": effort}
        work, dtype = operations(model, **asked), fast_dtype(torch.device("cpu"))
        before = rates(dtype)
        processes, threads = case.team
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
        command = [sys.executable, *launcher, "-m", "secateur", "prune", str(model), str(out), "--device", "cpu"]
        command += [f"--{name}={value}" for name, value in asked.items()]
        command += ["--memory", limit] if limit else []
        found = measured(command, group, threads)
        exact, rounded = map(max, zip(before, rates(dtype), strict=True))
        return found, work.seconds(rounded, exact), json.loads((out / "timings.json").read_text()).get("moved_bytes", 0)


def exponents(seconds: dict[Case, tuple[float, float]]) -> Iterator[str]:
    """Yield how seconds and products grow with one size at fixed others: the least-squares slope of logarithms."""
    for name in ("tokens", "depth", "width"):
        alike: dict[tuple[Any, ...], list[Case]] = {}
        for case in seconds:
            others = tuple(value for key, value in case.sizes.items() if key != name)
            alike.setdefault((*others, case.team), []).append(case)
        for cases in alike.values():
            if len({case.sizes[name] for case in cases}) > 1:
                x = torch.tensor([[math.log(case.sizes[name]), 1.0] for case in cases])
                y = torch.tensor([seconds[case] for case in cases]).log()
                slopes = torch.linalg.lstsq(x, y).solution[0].tolist()
                told = ", ".join(f"{case.shape} {case.blocks} x {case.samples}" for case in cases)
                yield f"Seconds grow as {name}^{slopes[0]:.2f}, products as {name}^{slopes[1]:.2f} ({told})."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", choices=SHAPES, nargs="+")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2])
    parser.add_argument("--samples", type=int, nargs="+", default=[32])
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[1],
        help="threads of each process, one number for each of --processes",
    )
    parser.add_argument("--experts", type=int, help="number of experts, to measure a part of a large mixture")
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--limit", help="memory, for example 6GiB")
    parser.add_argument("--folder", type=Path, help="folder for the models; default: a temporary folder")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    group = bounded(parse_memory(arguments.limit)) if arguments.limit else None
    teams = list(zip(arguments.processes, arguments.threads, strict=True))
    heads = ["shape", "blocks", "samples", "effort", "processes x threads", "limit", "wall s", "CPU s", "floor, s"]
    heads += ["over floor", "full depth, h", "peak GB", "GB sent"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    print("\n".join(lines), flush=True)
    seconds: dict[Case, tuple[float, float]] = {}
    for case in map(Case._make, product(arguments.shapes, arguments.blocks, arguments.samples, teams)):
        found, floor, moved = carried_out(
            case, arguments.experts, arguments.effort, arguments.limit, group, arguments.folder
        )
        seconds[case] = found.cpu, floor
        whole = found.wall / case.blocks * SHAPES[case.shape].depth / 3600
        cells = [case.shape, f"{case.blocks}", f"{case.samples}", f"`{arguments.effort}`"]
        cells += [" x ".join(map(str, case.team)), arguments.limit or ""]
        cells += [f"{found.wall:,.0f}", f"{found.cpu:,.0f}", f"{floor:,.0f}", f"{found.cpu / floor:.1f}"]
        cells += [f"{whole:.1f}", f"{found.peak / 1e9:.2f}", f"{moved / 1e9:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
        if arguments.out:
            put(arguments.out, f"scale {' '.join(arguments.shapes)}", lines)
    print(*exponents(seconds), sep="\n")


if __name__ == "__main__":
    main()
