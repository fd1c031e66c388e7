"""Time and memory of `prune` against the size of a model: random blocks of a shape, in files.

    python benchmarks/scale.py 7b --blocks 2 4 8 --samples 32 --limit 6GiB

makes a model of so many blocks, tensor by tensor, prunes it in a process of its own, and prints the CPU seconds, the
seconds of a whole model of that shape by the ones of a block, the ratio to the products that must be made (see
`floor.py`), and the peak resident set as the system counted it. `--limit` is passed on as `--memory`, and where control
groups can be made, the process runs in one of that size.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from floor import rates
from secateur.base.memory import LIMITS, bytes_of
from secateur.commands.dry_run import Speeds, works_of
from secateur.commands.open import open_model
from secateur.commands.steps import draw_rows
from secateur.plan.plan import plan
from secateur.write.shards import ShardWriter
from tables import put

VOCABULARY = 32_000


class Shape(NamedTuple):
    """Of a Llama model."""

    width: int
    channels: int
    heads: int
    groups: int
    depth: int


SHAPES = {
    "0.1b": Shape(576, 1536, 9, 3, 30),
    "1b": Shape(2048, 8192, 32, 8, 16),
    "7b": Shape(4096, 11_008, 32, 32, 32),
    "8b": Shape(4096, 14_336, 32, 8, 32),
    "70b": Shape(8192, 28_672, 64, 8, 80),
}


def make(shape: Shape, blocks: int, folder: Path) -> None:
    """A model of random weights in bfloat16, one tensor in memory at a time."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=shape.channels,
        num_hidden_layers=blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    d, f = shape.width, shape.channels
    keys = d // shape.heads * shape.groups
    sizes = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (keys, d), "self_attn.v_proj": (keys, d)}
    sizes |= {"self_attn.o_proj": (d, d), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    writer, dice = ShardWriter(folder), torch.Generator().manual_seed(0)

    def add(name: str, *size: int) -> None:
        writer.add(name, torch.randn(size, generator=dice).mul_(0.02).bfloat16())

    add("model.embed_tokens.weight", VOCABULARY, d)
    for index in range(blocks):
        for name, size in sizes.items():
            add(f"model.layers.{index}.{name}.weight", *size)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            writer.add(f"model.layers.{index}.{norm}.weight", torch.ones(d, dtype=torch.bfloat16))
    writer.add("model.norm.weight", torch.ones(d, dtype=torch.bfloat16))
    writer.close()


def bounded(limit: int) -> Path | None:
    """A new control group that may take so many bytes; None where none can be made."""
    for root, file in LIMITS.values():
        group = root / f"secateur-{os.getpid()}"
        with suppress(OSError):
            group.mkdir(exist_ok=True)
            (group / file).write_text(str(limit))
            return group / "cgroup.procs"
    return None


def measured(command: list[str], group: Path | None) -> tuple[float, int]:
    """CPU seconds and peak resident bytes of a process."""

    def enter() -> None:
        if group is not None:
            group.write_text(str(os.getpid()))

    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, preexec_fn=enter)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read()}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--limit", help="memory, for example 6GiB")
    parser.add_argument("--folder", type=Path, help="where models are made, by default a temporary folder")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = SHAPES[arguments.shape]
    group = bounded(bytes_of(arguments.limit)) if arguments.limit else None
    heads = ("blocks", "samples", "effort", "limit", "CPU s", "floor, s", "ratio", f"{shape.depth} blocks, h", "GB")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    print("\n".join(lines), flush=True)
    for blocks in arguments.blocks:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            model, out = Path(folder) / "model", Path(folder) / "out"
            model.mkdir()
            make(shape, blocks, model)
            asked = {"calibration": "random", "samples": arguments.samples, "effort": arguments.effort}
            run = open_model(model, **asked)
            work = works_of(run, draw_rows(run, dry=True), plan(run.request.problem, run.options.widths))
            before = rates(run.stream.quick_dtype)
            command = [sys.executable, "-m", "secateur", "prune", str(model), str(out), "--device", "cpu"]
            command += [f"--{name}={value}" for name, value in asked.items()]
            command += ["--memory", arguments.limit] if arguments.limit else []
            seconds, peak = measured(command, group)
            exact, quick = map(max, zip(before, rates(run.stream.quick_dtype), strict=True))
            floor = Speeds(quick, quick, exact, exact).seconds(work[arguments.effort])
            whole = seconds / blocks * shape.depth / 3600
            cells = (blocks, arguments.samples, f"`{arguments.effort}`", arguments.limit or "", f"{seconds:,.0f}")
            cells += (f"{floor:,.0f}", f"{seconds / floor:.1f}", f"{whole:.1f}", f"{peak / 1e9:.2f}")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
            print(lines[-1], flush=True)
            if arguments.out:
                put(arguments.out, f"scale {arguments.shape}", lines)


if __name__ == "__main__":
    main()
