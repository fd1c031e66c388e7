"""Compare the measured speedup of a pruned model with the expected one, in transformers and in llama.cpp.

    python benchmarks/speed.py DENSE PRUNED --out docs/results.md

The expected speedup of prefill is the ratio of the blocks' operations, including products with keys and values. The
expected speedup of decoding is the ratio of the bytes that one step reads: weights and cached keys and values. The two
models take turns, and the measured speedup is the median of the ratios. transformers runs the folders, and llama.cpp
their GGUF files in Q8_0, on as many threads as torch uses.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from llama_cpp_py_sync import _cffi_bindings as bindings

from secateur import BlockStream, open_checkpoint
from secateur.criteria.registry import SCORED_KINDS
from secateur.gguf.export import export
from secateur.measure.loading import load
from secateur.measure.speed import speeds
from secateur.model.axes import Width
from secateur.plan.plan_file import read_plan
from tables import put

PROMPT, NEW = 512, 32
ffi, lib = bindings.get_ffi(), bindings.get_lib()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("pruned")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    checkpoints = [open_checkpoint(model) for model in (arguments.dense, arguments.pruned)]
    stream = BlockStream(checkpoints[0])
    record = Path(arguments.pruned) / "secateur.json"
    left, _ = read_plan(record, stream.blocks, json.loads(record.read_text(encoding="utf-8"))["fingerprint"])
    dense = [block.width for block in stream.blocks]
    widths = [dense, [left.get(index, width) for index, width in enumerate(dense)]]
    lines = [
        "| engine | rows | prefill speedup | expected | ratio | decoding speedup | expected | ratio |",
        "|" + "---|" * 8,
    ]
    print("\n".join(lines), flush=True)

    def say(place: str, batch: int, bytes_of: float, got: tuple[float, float]) -> None:
        counts = [(operations(stream, one), step_bytes(stream, one, batch, bytes_of)) for one in widths]
        wanted = [before / after for before, after in zip(*counts, strict=True)]
        cells = [f"{g:.2f} | {w:.2f} | {g / w:.2f}" for g, w in zip(got, wanted, strict=True)]
        lines.append(f"| {place} | {batch} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)

    for dtype in (torch.float32, torch.bfloat16):
        models = [load(checkpoint, dtype, torch.device("cpu")) for checkpoint in checkpoints]
        for batch in arguments.batches:
            found = speeds(models, prompt=PROMPT, new=NEW, batch=batch, repeats=arguments.repeats)
            say(f"transformers, {str(dtype).removeprefix('torch.')}", batch, dtype.itemsize, found[1].over(found[0]))
        del models
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.gguf" for number in range(2)]
        for checkpoint, file in zip(checkpoints, files, strict=True):
            export(checkpoint.path, file, type="q8_0")
        for batch in arguments.batches:
            with opened(files[0], batch) as before, opened(files[1], batch) as after:
                turns = [[turn(context, batch) for context in (before, after)] for _ in range(arguments.repeats + 1)]
            ratios = [[a / b for a, b in zip(*times, strict=True)] for times in turns[1:]]
            say("llama.cpp, Q8_0", batch, 34 / 32, tuple(map(statistics.median, zip(*ratios, strict=True))))
    if arguments.out:
        put(arguments.out, f"speed {Path(arguments.dense).stem}", lines)


def operations(stream: BlockStream, widths: list[Width]) -> float:
    """Return the operations of all blocks for one token of a prompt."""
    heads = sum(block.modules[0].size * w.heads for block, w in zip(stream.blocks, widths, strict=True))
    return 2.0 * weights(stream, widths) + 2 * PROMPT * heads


def step_bytes(stream: BlockStream, widths: list[Width], batch: int, bytes_of: float) -> float:
    """Return the bytes that a decoding step reads: weights (`bytes_of` each) and keys and values (at least 2 each)."""
    cached = sum(2 * block.modules[0].size * w.kv_groups for block, w in zip(stream.blocks, widths, strict=True))
    everything = weights(stream, widths) + stream.width * stream.checkpoint.config.vocab_size
    return everything * bytes_of + cached * (PROMPT + NEW / 2) * batch * max(bytes_of, 2)


def weights(stream: BlockStream, widths: list[Width]) -> int:
    """Return the number of parameters of all attentions and feed-forwards."""
    return sum(
        block.module_parameters(width, kind)
        for block, width in zip(stream.blocks, widths, strict=True)
        for kind in SCORED_KINDS
    )


@contextmanager
def opened(file: Path, batch: int) -> Iterator[Any]:
    """Yield a context of llama.cpp for `batch` rows."""
    model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = batch * (PROMPT + NEW), PROMPT, PROMPT
    settings.n_seq_max = batch
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    context = lib.llama_init_from_model(model, settings)
    try:
        yield context
    finally:
        lib.llama_free(context)
        lib.llama_model_free(model)


def turn(context: Any, batch: int) -> tuple[float, float]:
    """Return the seconds of the prompts and of the decoding steps after them, on arbitrary token ids."""
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    start = time.perf_counter()
    for row in range(batch):
        decode(context, [(row, at) for at in range(PROMPT)])
    middle = time.perf_counter()
    for at in range(PROMPT, PROMPT + NEW):
        decode(context, [(row, at) for row in range(batch)], every=True)
    return middle - start, time.perf_counter() - middle


def decode(context: Any, tokens: list[tuple[int, int]], *, every: bool = False) -> None:
    """Decode tokens given by row and position in one call; compute the logits of the last one, or of every one."""
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for number, (row, at) in enumerate(tokens):
        batch.token[number], batch.pos[number] = 100 + (7 * at + row) % 1000, at
        batch.n_seq_id[number], batch.seq_id[number][0] = 1, row
        batch.logits[number] = every or number + 1 == len(tokens)
    assert lib.llama_decode(context, batch) == 0
    lib.llama_batch_free(batch)


if __name__ == "__main__":
    main()
