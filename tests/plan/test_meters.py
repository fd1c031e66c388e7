"""Sizes by meters equal the sizes of written and run models; time is counted in operations, not in seconds."""

import random
from collections.abc import Callable
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from torch.utils.flop_counter import FlopCounterMode

import models as tiny
from models import _config, load_written, make_letters, save, wide, write_pruned
from outputs import Notes, assert_error
from secateur import BlockStream, open_checkpoint, prune
from secateur.base.progress import Silent
from secateur.gguf.export import export
from secateur.gguf.format import gguf_byte_meter
from secateur.model.axes import Width
from secateur.model.structure import Block
from secateur.model.surgery import first_units
from secateur.model.units.channels import CHANNELS
from secateur.model.units.experts import EXPERTS
from secateur.model.units.heads import HEADS, HEADS_PER_GROUP, KV_GROUPS
from secateur.plan import latency
from secateur.plan.latency import LatencyTable, grid, latency_table
from secateur.plan.meters import Meter, budget_of, byte_meter, cache_meter, latency_meter, meter_of, parameter_meter
from secateur.plan.target import parse_target

MORE_ROWS = {
    "llama 64": _config("llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "qwen3 tied": _config("qwen3", **tiny.GROUPED, head_dim=16, tie_word_embeddings=True),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "MEASURED_SECONDS", 0.0)


@pytest.fixture
def _counted(monkeypatch):
    """Count operations instead of seconds."""
    monkeypatch.setattr(latency, "stopwatch", lambda _: operations)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], BlockStream]:
    """Return a function that opens a model with a tokenizer that GGUF can hold."""

    @cache
    def stream(name: str) -> BlockStream:
        folder = save(name, tmp_path_factory.mktemp("dense") / name.replace(" ", "-"))
        make_letters().save_pretrained(folder)
        return BlockStream(open_checkpoint(folder))

    return stream


def some_widths(blocks: list[Block], seed: int) -> dict[int, Width]:
    """Return widths that differ from block to block, some of them zero; one block stays dense."""
    dice = random.Random(seed)
    dense, widths = dice.randrange(len(blocks)), {}
    for index, block in enumerate(blocks):
        full = block.width
        groups, per_group = dice.randint(0, full[KV_GROUPS]), dice.randint(1, full[HEADS_PER_GROUP])
        if block.heads_locked:
            groups, per_group = dice.choice([0, full[KV_GROUPS]]), full[HEADS_PER_GROUP]
        channels = dice.choice([0, dice.randint(1, full[CHANNELS])])
        if index != dense:
            widths[index] = wide(groups, per_group if groups else 0, channels)
    return widths


def uniform_widths(blocks: list[Block], seed: int) -> dict[int, Width]:
    channels = random.Random(seed).randint(1, blocks[0].width[CHANNELS] - 1)
    return dict.fromkeys(range(len(blocks)), blocks[0].width | {CHANNELS: channels})


def fewer_experts(blocks: list[Block], seed: int) -> dict[int, Width]:
    return {index: block.width | {EXPERTS: 4 - seed} for index, block in enumerate(blocks) if EXPERTS in block.width}


def written(stream: BlockStream, widths: dict[int, Width], out: Path, dtype: torch.dtype = torch.float32) -> int:
    """Write the first units of given widths, and return the bytes of the weights."""
    keeps = {index: first_units(stream.blocks[index], width) for index, width in widths.items()}
    return write_pruned(stream.checkpoint.path, out, keeps, format="hf", dtype=dtype)


FOLDERS = ["llama", "llama biased", "llama tied", "gemma2", "olmo2", "phi3", "opt", "gpt2", "gpt_neox", "qwen3 biased"]


def held(out: Path) -> tuple[int, int]:
    """Return the parameters and the bytes of a written folder or GGUF file."""
    if out.suffix == ".gguf":
        return 0, sum(int(tensor.n_bytes) for tensor in GGUFReader(out).tensors)
    tensors = open_checkpoint(out).tensors.values()
    return sum(tensor.entries for tensor in tensors), sum(tensor.bytes for tensor in tensors)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FOLDERS)
def test_parameters_and_bytes_of_a_folder_are_exact(tmp_path, opened, name, seed):
    stream = opened(name)
    widths = some_widths(stream.blocks, seed)
    size = written(stream, widths, tmp_path / "out", torch.bfloat16)
    meters = parameter_meter(stream), byte_meter(stream, torch.bfloat16)
    assert tuple(meter.total(widths) for meter in meters) == held(tmp_path / "out")
    assert held(tmp_path / "out")[1] == size


BIASED: dict[str, Any] = {"recovery": "bias", "criterion": "l2", "calibration": "random", "samples": 4, "length": 16}


@pytest.mark.parametrize(
    ("name", "target", "file"),
    [
        *((name, target, False) for name in ("llama", "gemma2", "opt") for target in ("params=80%", "bytes=80%")),
        ("llama 64", "bytes=80%", True),
    ],
)
def test_added_biases_count_as_size(tmp_path, opened, name, target, file):
    """No bias is added before a norm, to a module that has one (OPT), or to a block outside the range."""
    stream, out = opened(name), tmp_path / ("out.gguf" if file else "out")
    options = {"format": "gguf", "type": "f32", "widths": "uniform"} if file else {"blocks": "1:3"}
    notes = Notes()
    summary = prune(stream.checkpoint.path, out, target=target, **BIASED | options, watcher=notes)
    assert not any("speed-up" in note for note in notes.said)
    parameters, taken = held(out)
    assert summary.bytes[1] == taken
    # llama.cpp keeps keys and values in float16.
    assert summary.cache_bytes[0] == cache_meter(stream, torch.float16 if file else torch.float32).dense
    assert file or summary.parameters[1] == parameters
    before, after = summary.parameters if target.startswith("params") else summary.bytes
    assert after <= 0.8 * before
    added = parameter_meter(stream, biases=True).bias_sizes
    assert sum(added) == (2 * len(stream) * stream.width if name.startswith("llama") else 0)


UNEVEN = ["llama", "llama biased", "llama 64", "llama tied", "qwen3 tied", "mistral"]
UNIFORM = ["gemma2", "phi3", "olmo2", "gpt2", "gpt_neox", "llama 64"]
MIXTURES = ["mixtral", "qwen2_moe", "glm4_moe", "ernie4_5_moe"]
PICKED = [
    *((name, some_widths) for name in UNEVEN),
    *((name, uniform_widths) for name in UNIFORM),
    *((name, fewer_experts) for name in MIXTURES),
    *(
        (name, lambda blocks, seed: dict.fromkeys(range(len(blocks)), wide(0, 0, 40 + seed)))
        for name in ("llama", "llama biased", "mistral")
    ),
]


@pytest.mark.parametrize(
    ("name", "pick", "type"), [(*row, type) for row, type in zip(PICKED, cycle(["f16", "q8_0", "q4_0"]))]
)
def test_bytes_of_a_gguf_file_are_exact(tmp_path, opened, name, pick, type):
    stream = opened(name)
    meter = gguf_byte_meter(stream, type)
    for seed in range(2):
        widths = pick(stream.blocks, seed)
        written(stream, widths, tmp_path / f"{seed}")
        done = export(tmp_path / f"{seed}", tmp_path / f"{seed}.gguf", type=type)
        assert meter.total(widths) == done.bytes == held(done.path)[1]


def operations(case: latency.Case) -> float:
    """Return the multiplications and additions of a run, as a replacement for seconds."""
    run = case()
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "decode") for name in ("llama", "gpt2", "gpt_neox", "olmo2")),
        *((name, "prefill") for name in ("llama", "opt", "gemma3_text", "phi3 wide")),
    ],
)
@pytest.mark.usefixtures("_counted")
def test_latency_agrees_with_the_whole_model(tmp_path, opened, name, kind):
    """Operations are counted over the whole model, dense and cut to widths of the grid."""
    stream = opened(name)
    meter = latency_meter(stream, kind, torch.float32, Silent())
    full = stream.blocks[0].width
    partly = full | {CHANNELS: 0}
    if not stream.blocks[0].heads_locked:
        fewer = grid(full[CHANNELS], latency.GRID_POINTS)[-2]
        partly = full | {KV_GROUPS: full[KV_GROUPS] - 1, CHANNELS: fewer}
    for widths in ({}, {0: wide(0, 0, full[CHANNELS]), 1: partly}):
        out = tmp_path / f"{len(widths)}"
        written(stream, widths or {0: full}, out)
        model = load_written(out)
        calls = (latency._model_call(model, length) for length in (tiny.POSITIONS - 1, 1))
        with torch.inference_mode():
            assert meter.total(widths) == pytest.approx(operations(latency._case(model, kind, *calls)))


def test_latency_of_a_module_narrower_along_two_axes():
    line = ((0, 0.0), (2, 4.0), (4, 12.0))
    lines = {KV_GROUPS: line, HEADS_PER_GROUP: ((0, 0.0), (3, 12.0)), CHANNELS: ((0, 0.0), (10, 5.0))}
    table = LatencyTable(lines, 1.0, 2.0)
    assert table.module_seconds(HEADS, wide(4, 3, 0)) == 12
    assert table.module_seconds(HEADS, wide(3, 3, 0)) == 8
    assert table.module_seconds(HEADS, wide(4, 1, 0)) == pytest.approx(4)
    assert table.module_seconds(HEADS, wide(3, 1, 0)) == pytest.approx(8 / 3)
    assert table.module_seconds(HEADS, wide(0, 0, 9)) == 0
    assert table.module_seconds([CHANNELS], wide(4, 3, 4)) == 2


@pytest.mark.usefixtures("_counted")
def test_latency_tables_are_cached(opened, monkeypatch, calls_of):
    measured, stream = calls_of(latency, "_measure"), opened("llama")

    def table(kind: str = "decode", block: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        return latency_table(stream, block, kind, dtype, Silent())

    first = table()
    assert table(block=2) == first
    assert len(measured) == 1
    other = table("prefill")
    assert table("prefill") == other
    table(dtype=torch.bfloat16)
    assert len(measured) == 3
    prompt = tiny.POSITIONS - 1
    assert other.lines[CHANNELS][-1][1] == prompt * first.lines[CHANNELS][-1][1]
    assert other.model_overhead == first.model_overhead, "logits are asked for of one token"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    table()
    assert len(measured) == 4


def a_meter(dense: float, form: Callable[[float], str] = "{:g} things".format) -> Meter:
    return Meter((wide(1, 1, 1),), dense / 2, lambda *_: dense / 4, form)


@pytest.mark.parametrize(
    ("target", "budget"), [("params=80%", 80e6), ("params=30M", 30e6), ("prefill=2x", 50e6), ("decode=1.25x", 80e6)]
)
def test_the_budget_of_a_target(target, budget):
    assert budget_of(parse_target(target), a_meter(100e6)) == budget
    message = r"params=100M: .* within it already, with 1e\+08 things; .* params=80%"
    assert_error(message, budget_of, parse_target("params=100M"), a_meter(100e6))


def test_each_target_has_its_meter(opened):
    stream = opened("llama")
    sizes = {"bytes": byte_meter, "kv": cache_meter}
    of_output = {name: partial(meter, stream, torch.bfloat16) for name, meter in sizes.items()}
    how: Any = (of_output, torch.bfloat16, Silent())
    parameters = parameter_meter(stream).dense
    wanted = {"params": parameters, "bytes": 2 * parameters, "kv": cache_meter(stream, torch.bfloat16).dense}
    assert {name: meter_of(parse_target(f"{name}=80%"), stream, *how).dense for name in wanted} == wanted
    meter = meter_of(parse_target("decode=2x"), stream, *how)
    assert meter.format_value(0.0123) == "12.3 ms"
    assert meter.dense > 0
    said = "attend to keys and values of other blocks"
    assert_error(said, meter_of, parse_target("decode=2x"), opened("gemma4_text small"), *how)


@pytest.mark.parametrize("name", ["gemma2", "gemma4_text", "gemma4_text small", "deepseek_v2"])
def test_the_cache_has_the_bytes_that_transformers_takes(tmp_path, opened, name):
    source, how = opened(name).checkpoint.path, BIASED | {"recovery": "none"}
    how |= {"target": "kv=60%"} if name == "gemma4_text" else {"sparsity": 0.3}
    summary = prune(source, tmp_path / "out", **how)
    for model, said in zip(map(load_written, (source, tmp_path / "out")), summary.cache_bytes, strict=True):
        caches = [model(tiny.token_rows(1, tokens), use_cache=True).past_key_values.layers for tokens in (2, 3)]
        # Blocks that attend to keys of other blocks have none.
        held = [[part for one in layers for part in (one.keys, one.values) if part is not None] for layers in caches]
        few, more = (sum(4 * part.numel() for part in parts) for parts in held)
        assert more - few == said
