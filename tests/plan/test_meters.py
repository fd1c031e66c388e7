"""Sizes by meters equal the sizes of written and run models; time is counted in operations, not in seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import models as tiny
from models import ROWS, _config, build, make_letters, save, selected, wide
from secateur import prune
from secateur.base.errors import SecateurError
from secateur.base.progress import Silent
from secateur.base.quiet import quiet
from secateur.base.words import format_count
from secateur.formats.format import PrunedModel
from secateur.formats.gguf_export import export
from secateur.formats.gguf_meter import gguf_byte_meter
from secateur.formats.hf import HfFolder
from secateur.model.axes import Width
from secateur.model.checkpoint import open_checkpoint
from secateur.model.per_layer import model_class
from secateur.model.stream import BlockStream
from secateur.model.structure import Block
from secateur.model.surgery import slice_block
from secateur.model.units.channels import CHANNELS
from secateur.model.units.heads import HEADS, HEADS_PER_GROUP, KV_GROUPS
from secateur.plan import latency, meters
from secateur.plan.latency import LatencyTable, grid, latency_table, medians, stopwatch
from secateur.plan.meters import (
    Meter,
    budget_of,
    byte_meter,
    cache_meter,
    latency_meter,
    meter_of,
    parameter_meter,
    unreachable_error,
)
from secateur.plan.target import parse_target

CPU = torch.device("cpu")
MORE_ROWS = {
    "llama 64": _config("llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "qwen3 tied": _config("qwen3", **tiny.GROUPED, head_dim=16, tie_word_embeddings=True),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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
    dense = dice.randrange(len(blocks))
    widths = {}
    for index, block in enumerate(blocks):
        if index == dense:
            continue
        full = block.width
        groups, per_group = dice.randint(0, full[KV_GROUPS]), dice.randint(1, full[HEADS_PER_GROUP])
        if block.attention.locked:
            groups, per_group = dice.choice([0, full[KV_GROUPS]]), full[HEADS_PER_GROUP]
        channels = dice.choice([0, dice.randint(1, full[CHANNELS])])
        widths[index] = wide(groups, per_group if groups else 0, channels)
    return widths


def uniform_widths(blocks: list[Block], seed: int) -> dict[int, Width]:
    full = blocks[0].width
    channels = random.Random(seed).randint(1, full[CHANNELS] - 1)
    return {index: wide(full[KV_GROUPS], full[HEADS_PER_GROUP], channels) for index in range(len(blocks))}


def written(stream: BlockStream, widths: dict[int, Width], out: Path, dtype: torch.dtype = torch.float32) -> int:
    """Write a model with given widths as `prune` does; return the bytes of its weights."""

    def blocks() -> Iterator[tuple[int, dict[str, Any]]]:
        for index, width in widths.items():
            block = stream.blocks[index]
            per_group = block.attention.per_group
            heads = [
                group * per_group + head for group in range(width[KV_GROUPS]) for head in range(width[HEADS_PER_GROUP])
            ]
            cut = slice_block(block, stream.stored(index), selected(tuple(heads), tuple(range(width[CHANNELS]))))
            yield index, {name: tensor.to(dtype) for name, tensor in cut.items()}

    record = {"secateur": "0"}
    plan: Any = SimpleNamespace(widths=widths)
    return HfFolder(stream, dtype=dtype).write(out, PrunedModel(plan, blocks(), records={"secateur.json": record}))


FOLDERS = ["llama", "llama biased", "llama tied", "gemma2", "olmo2", "phi3", "opt", "gpt2", "gpt_neox", "qwen3 biased"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FOLDERS)
def test_parameters_and_bytes_of_a_folder_are_exact(tmp_path, opened, name, seed):
    stream = opened(name)
    widths = some_widths(stream.blocks, seed)
    size = written(stream, widths, tmp_path / "out", torch.bfloat16)
    tensors = open_checkpoint(tmp_path / "out").tensors.values()
    assert parameter_meter(stream).total(widths) == sum(tensor.entries for tensor in tensors)
    assert byte_meter(stream, torch.bfloat16).total(widths) == size == sum(tensor.bytes for tensor in tensors)


@pytest.mark.parametrize(
    ("name", "target", "file"),
    [
        *((name, target, False) for name in ("llama", "gemma2", "opt") for target in ("params=80%", "bytes=80%")),
        ("llama 64", "bytes=80%", True),
    ],
)
def test_added_biases_count_as_size(tmp_path, opened, name, target, file):
    """No bias is added before a norm, to a module that has one (OPT), or to a block outside the range."""
    stream = opened(name)
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 40)
    out = tmp_path / ("out.gguf" if file else "out")
    options = {"format": "gguf", "type": "f32", "widths": "uniform"} if file else {"blocks": "1:3"}
    summary = prune(
        stream.checkpoint.path,
        out,
        target=target,
        recovery="bias",
        criterion="l2",
        calibration=str(text),
        samples=4,
        length=16,
        **options,
    )
    if file:
        taken = sum(tensor.n_bytes for tensor in GGUFReader(out).tensors)
    else:
        tensors = open_checkpoint(out).tensors.values()
        assert summary.parameters[1] == sum(tensor.entries for tensor in tensors)
        taken = sum(tensor.bytes for tensor in tensors)
    assert summary.bytes[1] == taken
    index = 0 if target.startswith("params") else 1
    before, after = (summary.parameters, summary.bytes)[index]
    assert after <= 0.8 * before
    added = parameter_meter(stream, biases=True).bias_sizes
    assert sum(added) == (2 * len(stream) * stream.width if name.startswith("llama") else 0)


@pytest.mark.parametrize("name", ["apertus", "deepseek_v3", "minimax_m2"])
def test_buffers_are_stored_but_no_parameters(opened, name):
    stream = opened(name)
    parameters = sum(value.numel() for value in build(name).parameters())
    stored = sum(value.numel() for value in build(name).state_dict().values())
    assert parameter_meter(stream).dense == parameters < stored
    assert sum(block.parameters for block in stream.blocks) < parameters
    assert byte_meter(stream, torch.float32).dense == 4 * stored


@pytest.mark.parametrize("name", ROWS)
def test_sizes_of_dense_models_are_exact(opened, name):
    stream = opened(name)
    count = sum(value.numel() for value in build(name).parameters())
    assert parameter_meter(stream).dense == count
    assert byte_meter(stream, torch.float16).dense == 2 * count
    keys = [parameter for path, parameter in build(name).named_parameters() if path.endswith("k_proj.weight")]
    if keys:
        assert cache_meter(stream, torch.float32).dense == 8 * sum(len(weight) for weight in keys)


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_a_norm_after_a_module_excludes_added_biases_in_gguf(opened, name):
    meters = [gguf_byte_meter(opened(name), "f16", biases) for biases in (False, True)]
    assert meters[0].dense == meters[1].dense


def headless_widths(blocks: list[Block], seed: int) -> dict[int, Width]:
    return dict.fromkeys(range(len(blocks)), wide(0, 0, 40 + seed))


@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_gguf_bytes_include_biases_of_a_block_without_heads(tmp_path, opened, type):
    """GGUF keeps an idle head for the bias of such a block."""
    stream, widths = opened("llama 64"), (wide(2, 1, 40), wide(0, 0, 72), wide(2, 2, 0))
    blocks = [{"block": index, "width": dict(width)} for index, width in enumerate(widths)]
    (tmp_path / "plan.json").write_text(json.dumps({"blocks": blocks}))
    how: Any = {"calibration": "random", "samples": 4, "length": 16, "recovery": "bias", "criterion": "l2"}
    out = tmp_path / "out.gguf"
    summary = prune(stream.checkpoint.path, out, plan=str(tmp_path / "plan.json"), format="gguf", type=type, **how)
    assert summary.bytes[1] == sum(tensor.n_bytes for tensor in GGUFReader(out).tensors)


UNEVEN = ["llama", "llama biased", "llama 64", "llama tied", "qwen3 tied", "mistral"]
UNIFORM = ["gemma2", "phi3", "olmo2", "gpt2", "gpt_neox", "llama 64"]


PICKED = [
    *((name, some_widths) for name in UNEVEN),
    *((name, uniform_widths) for name in UNIFORM),
    *((name, headless_widths) for name in ("llama", "llama biased", "mistral")),
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
        assert meter.total(widths) == done.bytes
        assert meter.total(widths) == sum(tensor.n_bytes for tensor in GGUFReader(done.path).tensors)


def test_the_gguf_meter_counts_padding(opened):
    meter = gguf_byte_meter(opened("llama 64"), "q8_0")
    sizes = [meter.module_size(0, "channels", wide(2, 2, channels)) for channels in range(73)]
    assert len(set(sizes[:33])) == 1 < len(set(sizes[:34]))
    # 3 matrices, 32 channels by 64, 34 bytes for 32 weights
    assert sizes[33] - sizes[32] == 3 * 32 * 64 // 32 * 34


def test_the_cache_meter_counts_keys_and_values(opened):
    stream = opened("qwen3")
    meter = cache_meter(stream, torch.bfloat16)
    assert meter.dense == 3 * 3 * 16 * 2 * 2
    assert meter.total({0: wide(0, 0, 72), 1: wide(1, 2, 0), 2: wide(3, 1, 5)}) == (0 + 1 + 3) * 64
    assert meter.format_value(meter.dense) == "576 B per token"


def operations(case: latency.Case) -> float:
    """Return the multiplications and additions of a run, as a replacement for seconds."""
    run = case()
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def fails(case: latency.Case) -> float:
    raise AssertionError("measured again")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "decode") for name in ("llama", "gpt2", "gpt_neox", "olmo2")),
        *((name, "prefill") for name in ("llama", "opt", "gemma3_text", "phi3 wide")),
    ],
)
def test_latency_agrees_with_the_whole_model(tmp_path, opened, name, kind):
    """Operations are counted over the whole model, dense and cut to widths of the grid."""
    stream = opened(name)
    meter = latency_meter(stream, kind, CPU, torch.float32, Silent(), operations)
    full = stream.blocks[0].width
    partly = wide(full[KV_GROUPS], full[HEADS_PER_GROUP], 0)
    if not stream.blocks[0].attention.locked:
        partly = wide(full[KV_GROUPS] - 1, full[HEADS_PER_GROUP], grid(full[CHANNELS], latency.GRID_POINTS)[-2])
    length = tiny.POSITIONS - 1
    for widths in ({}, {0: wide(0, 0, full[CHANNELS]), 1: partly}):
        out = tmp_path / f"{len(widths)}"
        written(stream, widths or {0: full}, out)
        with quiet():
            checkpoint = open_checkpoint(out)
            model = model_class(checkpoint.config).from_pretrained(out, dtype=torch.float32)
        case = latency._case(model, kind, latency._model_call(model, length), latency._model_call(model, 1))
        with torch.inference_mode():
            assert meter.total(widths) == pytest.approx(operations(case))


def test_latency_is_interpolated_between_measured_widths(opened):
    meter = latency_meter(opened("llama every head"), "prefill", CPU, torch.float32, Silent(), operations)
    sizes = [meter.module_size(1, "channels", wide(6, 1, channels)) for channels in range(73)]
    assert sizes == pytest.approx([channels / 72 * sizes[72] for channels in range(73)])
    assert sizes[0] == 0 == meter.module_size(1, "heads", wide(0, 0, 72))
    heads = [meter.module_size(1, "heads", wide(groups, 1, 0)) for groups in range(7)]
    assert heads == sorted(heads)
    assert heads[-1] > 0


def test_latency_includes_blocks_without_modules(opened, monkeypatch):
    """Embedding and output layer count once; norms count in every block."""
    line = ((0, 0.0), (6, 1.0))
    table = LatencyTable(dict.fromkeys((*HEADS, CHANNELS), line), model_overhead=5.0, block_overhead=2.0)
    monkeypatch.setattr(meters, "latency_table", lambda *_: table)
    meter = latency_meter(opened("llama"), "decode", CPU, torch.float32, Silent())
    assert meter.total(dict.fromkeys(range(3), wide(0, 0, 0))) == 5.0 + 3 * 2.0
    single: Any = SimpleNamespace(blocks=opened("llama").blocks[:1])
    assert latency_meter(single, "decode", CPU, torch.float32, Silent()).total({0: wide(0, 0, 0)}) == 5.0 + 2.0


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


def test_a_narrower_module_never_takes_longer(opened, monkeypatch):
    """Times are monotonic with any noise of the clock."""
    monkeypatch.setattr(latency, "MAX_SECONDS", 0.0)
    dice = random.Random(3)

    def noisy(case: latency.Case) -> float:
        return operations(case) * 1.5 ** dice.gauss(0, 1) + dice.random()

    stream = opened("llama")
    meter = latency_meter(stream, "decode", CPU, torch.float32, Silent(), noisy)
    full = stream.blocks[0].width
    for line in (
        [meter.module_size(0, "channels", wide(0, 0, channels)) for channels in range(73)],
        [
            meter.module_size(0, "heads", wide(groups, full[HEADS_PER_GROUP], 0))
            for groups in range(full[KV_GROUPS] + 1)
        ],
        [meter.module_size(0, "heads", wide(full[KV_GROUPS], heads, 0)) for heads in range(full[HEADS_PER_GROUP] + 1)],
    ):
        assert line == sorted(line)
        assert line[0] == 0
        assert line[-1] > 0
    assert meter.fixed > 0
    table = latency_table(stream, 0, "decode", CPU, torch.float32, Silent(), fails)
    assert table.lines[KV_GROUPS][-1][1] == table.lines[HEADS_PER_GROUP][-1][1], (
        "the dense attention takes one time, however it is narrowed"
    )


def test_latency_tables_are_cached(tmp_path, opened, monkeypatch):
    stream = opened("llama")
    first = latency_table(stream, 0, "decode", CPU, torch.float32, Silent(), operations)
    assert latency_table(stream, 2, "decode", CPU, torch.float32, Silent(), fails) == first
    for kind, dtype in (("prefill", torch.float32), ("decode", torch.bfloat16)):
        with pytest.raises(AssertionError, match="measured again"):
            latency_table(stream, 0, kind, CPU, dtype, Silent(), fails)
    other = latency_table(stream, 0, "prefill", CPU, torch.float32, Silent(), operations)
    assert latency_table(stream, 0, "prefill", CPU, torch.float32, Silent(), fails) == other
    assert other.lines[CHANNELS][-1][1] == (tiny.POSITIONS - 1) * first.lines[CHANNELS][-1][1], (
        "a prompt has as many tokens"
    )
    assert other.model_overhead == first.model_overhead, "logits are asked for of one token"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    with pytest.raises(AssertionError, match="measured again"):
        latency_table(stream, 0, "decode", CPU, torch.float32, Silent(), fails)


def changed(**keys: Any) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | keys)


def lined(**lines: Any) -> Callable[[str], str]:
    return lambda text: changed(lines=json.loads(text)["lines"] | lines)(text)


BROKEN = [
    lambda text: "",
    lambda text: text[: len(text) // 2],
    lambda text: "[]",
    changed(block_overhead=None),
    changed(block_overhead=float("nan")),
    changed(model_overhead=-1.0),
    lined(channels=[[0, 0.0]]),
    lined(channels=[[0, 0.0], [9, 2.0], [72, 1.0]]),
    lined(channels=7),
    lined(kv_groups=[[0, 0.0], [3, float("inf")]]),
    changed(facts={}),
]


def test_broken_cache_files_are_measured_again(tmp_path, opened):
    stream = opened("llama")
    first = latency_table(stream, 0, "decode", CPU, torch.float32, Silent(), operations)
    (file,) = (tmp_path / "cache" / "secateur" / "latency").iterdir()
    whole = file.read_text()
    for broken in BROKEN:
        file.write_text(broken(whole))
        with pytest.raises(AssertionError, match="measured again"):
            latency_table(stream, 0, "decode", CPU, torch.float32, Silent(), fails)
    assert latency_table(stream, 0, "decode", CPU, torch.float32, Silent(), operations) == first
    assert file.read_text() == whole


def test_latency_is_measured_without_a_cache_folder(tmp_path, opened, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert latency_table(opened("llama"), 0, "decode", CPU, torch.float32, Silent(), operations).block_overhead == 0


def test_measuring_does_not_change_the_random_state(opened):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    latency_table(opened("llama"), 0, "decode", CPU, torch.float32, Silent(), operations)
    assert torch.equal(torch.rand(3), expected)


def test_medians_ignore_outliers_and_end_when_precise(monkeypatch):
    runs: list[str] = []

    def timer(case: latency.Case) -> float:
        name = str(case())
        runs.append(name)
        count = runs.count(name)
        return {"a": 1.0, "b": 2.0}[name] * (50 if count == 1 or count % 5 == 4 else 1)

    monkeypatch.setattr(latency, "MAX_SECONDS", 1e9)
    cases: Any = [lambda: "a", lambda: "b"]
    assert medians(cases, timer) == [1.0, 2.0]
    assert runs.count("a") == runs.count("b") > latency.MIN_ROUNDS
    assert all(set(runs[i : i + 2]) == {"a", "b"} for i in range(0, len(runs), 2))


def test_medians_end_at_the_time_limit(monkeypatch):
    dice = random.Random(0)
    times: list[float] = []

    def timer(case: latency.Case) -> float:
        times.append(dice.choice([1.0, 10.0]))
        return times[-1]

    monkeypatch.setattr(latency, "MAX_SECONDS", 100.0)
    monkeypatch.setattr(latency, "perf_counter", lambda: sum(times))
    cases: Any = [lambda: "a", lambda: "b"]
    medians(cases, timer)
    assert 100 < sum(times[2:]) <= 120


@given(full=st.integers(1, 20_000), points=st.integers(3, 14))
@example(full=60, points=10)
def test_grid_is_even_and_rounded(full, points):
    counts = grid(full, points)
    assert counts == sorted(set(counts))
    assert (counts[0], counts[-1]) == (0, full)
    assert len(counts) <= points
    if full < points:
        assert counts == list(range(full + 1))
    unit = max(unit for unit in (2**power for power in range(8)) if unit == 1 or full >= unit * (points - 1))
    assert all(count % unit == 0 for count in counts[:-1])
    if full >= 128 * points:
        assert len(counts) == points
        assert all(count % 128 == 0 for count in counts[:-1])


def test_the_stopwatch_waits_for_a_gpu(monkeypatch):
    log: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: log.append("wait"))
    case: Any = lambda: log.append("ready") or (lambda: log.append("run"))  # noqa: E731
    assert stopwatch(torch.device("cuda"))(case) >= 0
    assert log == ["ready"] * 8 + ["wait"] + ["run"] * 8 + ["wait"]
    log.clear()
    assert stopwatch(CPU)(case) >= 0
    assert log == ["ready", "run"]


def a_meter(dense: float, form: Callable[[float], str] = "{:g} things".format) -> Meter:
    return Meter((wide(1, 1, 1),), dense / 2, lambda *_: dense / 4, form)


@pytest.mark.parametrize(
    ("target", "budget"),
    [("params=80%", 80e6), ("params=30M", 30e6), ("kv=50%", 50e6), ("prefill=2x", 50e6), ("decode=1.25x", 80e6)],
)
def test_the_budget_of_a_target(target, budget):
    assert budget_of(parse_target(target), a_meter(100e6)) == budget


def test_a_target_above_the_dense_model_is_refused():
    with pytest.raises(SecateurError, match=r"params=100M: .* no more than 1e\+08 things; .* params=80%"):
        budget_of(parse_target("params=100M"), a_meter(100e6))


@pytest.mark.parametrize(
    ("target", "least", "says"),
    [
        ("params=10%", 33.33e6, "params=33.4%"),
        ("params=10%", 33.395e6, "params=33.4%"),
        ("params=10M", 33.33e6, "params=33.4M"),
        ("bytes=10MB", 99.99e6, "bytes=99.99MB"),
        ("prefill=9x", 33.33e6, "prefill=3x"),
        ("decode=3x", 51e6, "decode=1.96x"),
        ("decode=3x", 99.9e6, "do not change this quantity"),
        ("kv=50%", 100e6, "do not change this quantity"),
        ("bytes=5MB", 100e6, "do not change this quantity"),
    ],
)
def test_an_unreachable_target_names_the_nearest_reachable_one(target, least, says):
    meter, wanted = a_meter(100e6), parse_target(target)
    error = str(unreachable_error(wanted, meter, least))
    assert f"target {wanted}" in error
    assert says in error
    assert "\n" not in error
    if "=" in says:
        assert budget_of(parse_target(says), meter) >= least


def test_each_target_has_its_meter(opened, monkeypatch):
    monkeypatch.setattr(latency, "MAX_SECONDS", 0.0)
    stream = opened("llama")
    how: Any = {"dtype": torch.bfloat16, "output_bytes": lambda: byte_meter(stream, torch.bfloat16), "device": CPU}
    how["watcher"] = Silent()
    parameters = parameter_meter(stream).dense
    assert meter_of(parse_target("params=80%"), stream, **how).dense == parameters
    assert meter_of(parse_target("bytes=80%"), stream, **how).dense == 2 * parameters
    assert meter_of(parse_target("kv=80%"), stream, **how).dense == cache_meter(stream, torch.bfloat16).dense
    meter = meter_of(parse_target("decode=2x"), stream, **how)
    assert meter.format_value(0.0123) == "12.3 ms"
    assert meter.dense > 0
    for target in ("kv=80%", "decode=2x"):
        with pytest.raises(SecateurError, match="attend to keys and values of other blocks"):
            meter_of(parse_target(target), opened("gemma4_text small"), **how)


@given(st.integers(0, 10**12))
def test_counts_above_a_million_have_two_decimals(value):
    number, million, rest = format_count(value).replace(",", "").partition(" M")
    assert rest == ""
    assert bool(million) == (value >= 10**6)
    assert abs(float(number) * (10**6 if million else 1) - value) <= (5001 if million else 0)
    assert format_count(134_515_008, 1) == "134.5 M"
