"""Time of each module at several widths on this machine, measured on transformers' layers and cached on disk.

The measurement builds a model of one layer with random weights from the config. Copies of the layer are cut to a grid
of widths of one module, with the other modules removed. The copies are timed in turns, so that a busy machine slows all
of them equally. The time of a module is the time of its layer minus the time of a layer without modules. Between the
widths of the grid, times are interpolated.
"""

from __future__ import annotations

import copy
import inspect
import platform
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any, Literal

import numpy as np
import torch
import transformers
from pydantic import Field
from torch import nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache

from secateur.base.cache import cached_value
from secateur.base.device import clock
from secateur.base.progress import Watcher
from secateur.base.quiet import quiet
from secateur.checkpoints.facts import positions_of
from secateur.model.axes import Axis, Width
from secateur.model.stream import BlockStream
from secateur.model.structure import PrunableModule
from secateur.model.surgery import cut_down

PROMPT_TOKENS = 512
"""Number of tokens of the prompt, and of tokens in the cache when one token is decoded; fewer if the model has fewer
positions."""
GRID_POINTS = 10
"""Number of widths to time along an axis of channels, including zero; along other axes up to two more."""
MEASURED_SECONDS = 5.0
"""Time of the measurement of one table, in seconds, after every case has been run once."""
_FLUSH_BYTES = 2**28
"""Number of bytes whose reading evicts all earlier data from any processor's caches."""
_VERSION = 2
"""Version of the measurement, part of the cache key; increase it when the measurement changes."""

Run = Callable[[], object]
"""Run of a layer or model, to be timed."""
Case = Callable[[], Run]
"""Function that prepares a run and returns it; the preparation is not timed."""
Timer = Callable[[Case], float]
"""Function that returns the seconds of one run of a case."""


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Line = Annotated[tuple[tuple[int, Seconds], ...], Field(min_length=2)]
"""Pairs of a number of units and seconds, both ascending from zero to the values of the dense module."""


@dataclass(frozen=True)
class LatencyTable:
    """Times of a model whose blocks all have the same shapes; pydantic checks the fields of a cached table."""

    lines: dict[str, Line]
    """Seconds of a module by the number of units along each of its axes, with its other axes dense."""
    block_overhead: Seconds
    """Seconds of a block without modules: its norms, and the work of transformers around them."""
    model_overhead: Seconds
    """Seconds of the model without blocks: embedding, masks, last norm and output layer."""

    def module_seconds(self, axes: Sequence[str], width: Width) -> float:
        """Return the seconds of a module with the given axes at a width; a narrower module never takes longer."""
        if not all(width[axis] for axis in axes):
            return 0.0
        dense = self.lines[axes[0]][-1][1]
        share = 1.0
        for axis in axes:
            # Each axis was measured alone. For a module that is narrower along two axes, the speedups of both are
            # multiplied.
            units, seconds = zip(*self.lines[axis], strict=True)
            share *= float(np.interp(width[axis], units, seconds)) / dense if dense else 0.0
        return dense * share


def latency_table(
    stream: BlockStream,
    index: int,
    kind: Literal["prefill", "decode"],
    dtype: torch.dtype,
    watcher: Watcher,
) -> LatencyTable:
    """Return the table for blocks with the shapes of one block, from the cache on disk or by a measurement.

    Args:
        stream: The dense model.
        index: Index of the block.
        kind: `prefill` for a prompt of `PROMPT_TOKENS` tokens; `decode` for one token with `PROMPT_TOKENS` tokens in
            the cache.
        dtype: Dtype of weights and activations.
        watcher: Display of progress.
    """

    def measured() -> LatencyTable:
        with watcher.busy(f"Measuring how fast this machine runs a block ({kind})"):
            return _measure(stream, index, kind, dtype)

    return cached_value("latency", _cache_key(stream, index, kind, dtype), LatencyTable, measured)


def stopwatch(device: torch.device) -> Timer:
    """Return a timer that uses the clock. On a GPU, which runs asynchronously, eight runs are timed together."""
    count = 1 if device.type == "cpu" else 8

    def timed(case: Case) -> float:
        runs = [case() for _ in range(count)]
        start = clock(device)
        for run in runs:
            run()
        return (clock(device) - start) / count

    return timed


def medians(cases: Sequence[Case], timer: Timer) -> list[float]:
    """Return the median seconds of each case, from rounds over all cases."""
    samples: list[list[float]] = [[] for _ in cases]
    for case in cases:
        # The first run of a shape also prepares kernels, so it is not measured.
        timer(case)
    start, order, generator = perf_counter(), list(range(len(cases))), random.Random(0)
    while not samples[0] or perf_counter() - start < MEASURED_SECONDS:
        # A run is slower right after a large run, so the order changes from round to round.
        generator.shuffle(order)
        for at in order:
            samples[at].append(timer(cases[at]))
    return [median(seconds) for seconds in samples]


def grid(full: int, points: int) -> list[int]:
    """Return up to `points` numbers of units from 0 to `full`, about evenly spaced.

    Numbers between the ends are multiples of a power of two, because kernels are fastest at such numbers and plans
    are rounded to them.
    """
    step = next(step for step in (128, 64, 32, 16, 8, 4, 2, 1) if step == 1 or full >= step * (points - 1))
    inner = (step * round(full * i / (points - 1) / step) for i in range(1, points - 1))
    return sorted({0, full, *(count for count in inner if 0 < count < full)})


@torch.inference_mode()
def _measure(stream: BlockStream, index: int, kind: str, dtype: torch.dtype) -> LatencyTable:
    """Measure the table for blocks with the shapes of one block."""
    device, block = stream.device, stream.blocks[index]
    model = _one_layer_model(stream, index, dtype)
    layer, stock = model.get_submodule(stream.family.blocks)[0], stream.stock.blocks[index]
    cut_down(layer, stock, block.width, [name for name in block.shapes if name not in stock.shapes])
    length = _prompt_length(model.config)
    prefill, decode = _record_calls(model, layer, length)

    def layer_case(width: Width) -> Case:
        narrowed = copy.deepcopy(layer)
        cut_down(narrowed, block, width)
        return _case(model, kind, partial(prefill, narrowed), partial(decode, narrowed))

    empty = Width(dict.fromkeys(block.width, 0))
    lines = {axis.name: _line_widths(module, axis, empty) for module in block.modules_left for axis in module.axes}
    widths = dict.fromkeys((empty, *(width for line in lines.values() for width in line.values())))
    cases: dict[Width | None, Case] = {width: layer_case(width) for width in widths}
    # The smallest number of units along the first axis of each module.
    small = layer_case(block.width | {m.axes[0].name: list(lines[m.axes[0].name])[1] for m in block.modules_left})
    # The rest of the model is timed around an empty layer.
    cut_down(layer, block, empty)
    cases[None] = _case(model, kind, _model_call(model, length), _model_call(model, 1))
    if kind == "decode" and device.type == "cpu":
        weights = sum(parameter.numel() for parameter in stream.model.parameters()) * dtype.itemsize
        other_weights = torch.ones(min(_FLUSH_BYTES, weights) // 4, dtype=torch.float32)
        cases = {width: _with_cold_weights(case, small, other_weights) for width, case in cases.items()}
    seconds = dict(zip(cases, medians(list(cases.values()), stopwatch(device)), strict=True))
    # Every line of a module ends at the dense module, whose time must be at least that of all narrower ones.
    for module in block.modules_left:
        module_widths = [width for axis in module.axes for width in lines[axis.name].values()]
        seconds[module_widths[-1]] = max(seconds[width] for width in module_widths)
    overhead = seconds[empty]

    def rising(line: dict[int, Width]) -> Line:
        # A wider module that seems faster is noise, so each value is the maximum so far.
        beyond = np.maximum.accumulate([seconds[width] - overhead for width in line.values()])
        return tuple(zip(line, beyond.tolist(), strict=True))

    model_overhead = max(0.0, seconds[None] - overhead)
    return LatencyTable({name: rising(line) for name, line in lines.items()}, overhead, model_overhead)


def _with_cold_weights(case: Case, small: Case, other_weights: torch.Tensor) -> Case:
    """Return a case that runs with the weights of the layer evicted from the processor's caches.

    When the whole model decodes a token, it reads every weight once, so that the weights of a layer are evicted before
    the layer runs again. A run of a small layer then brings back data that are not weights.
    """

    def prepare() -> Run:
        other_weights.sum()
        small()()
        return case()

    return prepare


def _line_widths(module: PrunableModule, axis: Axis, empty: Width) -> dict[int, Width]:
    """Return the widths to time along one axis of a module, by the number of units; the other modules are removed."""
    # Locked axes have two numbers: no unit and all units. Numbers of heads are small, so more of them are timed.
    points = 2 if axis.locked else GRID_POINTS if axis.rounded else GRID_POINTS + 2
    dense = {other.name: other.units for other in module.axes}
    return {0: empty} | {number: empty | dense | {axis.name: number} for number in grid(axis.units, points)[1:]}


def _one_layer_model(stream: BlockStream, index: int, dtype: torch.dtype) -> Any:
    """Return a model with one layer of the kind of a block, with random weights."""
    config, device = copy.deepcopy(stream.stock.config), stream.device
    config.num_hidden_layers = 1
    if layer_types := getattr(config, "layer_types", None):
        config.layer_types = layer_types[index : index + 1]
    with quiet(), torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()


def _prompt_length(config: Any) -> int:
    """Return the number of tokens of the prompt; at least one position is left for a token to decode."""
    positions = positions_of(config)
    return PROMPT_TOKENS if positions is None else max(1, min(PROMPT_TOKENS, positions - 1))


def _record_calls(model: Any, layer: nn.Module, length: int) -> list[Callable[[nn.Module, Cache], Run]]:
    """Record how the model calls its layer for a prompt and then for one token.

    Returns:
        Two functions, for the prompt and for the token. Each returns a run of a layer, with a cache, on the recorded
        arguments.
    """
    calls: list[Callable[[nn.Module, Cache], Run]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        def call(other: nn.Module, cache: Cache) -> Run:
            positional = [cache if isinstance(value, Cache) else value for value in args]
            named = {key: cache if isinstance(value, Cache) else value for key, value in kwargs.items()}
            return partial(other, *positional, **named)

        calls.append(call)

    cache = DynamicCache(config=model.config)
    with layer.register_forward_pre_hook(record, with_kwargs=True):
        _model_call(model, length)(cache)()
        _model_call(model, 1)(cache)()
    return calls


def _model_call(model: Any, count: int) -> Callable[[Cache], Run]:
    """Return a function from a cache to a run of the whole model on random tokens, with logits of the last token."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0)).to(model.device)
    # Newer versions of transformers call the argument `cache`.
    key = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return lambda cache: partial(model, ids, **{key: cache}, use_cache=True, logits_to_keep=1)


def _case(model: Any, kind: str, prompt: Callable[[Cache], Run], token: Callable[[Cache], Run]) -> Case:
    """Return the case of a prompt, or of one token after the prompt; each run has its own cache."""
    if kind == "prefill":
        return lambda: prompt(DynamicCache(config=model.config))
    cache = DynamicCache(config=model.config)
    prompt(cache)()

    def ready() -> Run:
        # The copy shares the tensors of the cache; the run may append to the copy.
        fresh = copy.copy(cache)
        fresh.layers = [copy.copy(layer) for layer in cache.layers]
        return token(fresh)

    return ready


def _cache_key(stream: BlockStream, index: int, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return all settings on which a table depends, as JSON types."""
    config, block = stream.checkpoint.config, stream.blocks[index]
    inside, layer_types = f"{stream.family.blocks}.", getattr(config, "layer_types", None)
    return {
        "version": _VERSION,
        "kind": kind,
        "device": _device_name(stream.device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model_type": config.model_type,
        "attention": getattr(stream.model.config, "_attn_implementation", None),
        "layer_type": layer_types[index] if layer_types else None,
        "window": getattr(config, "sliding_window", None),
        "length": _prompt_length(config),
        "width": dict(block.width),
        "block": {name: list(shape) for name, shape in block.shapes.items()},
        "others": {n: list(p.shape) for n, p in stream.model.named_parameters() if not n.startswith(inside)},
    }


def _device_name(device: torch.device) -> str:
    """Return the model name of the GPU or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [device.type, platform.machine(), platform.processor()]
    with suppress(OSError):
        # On Linux, `platform.processor` returns an empty string.
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("model name")][:1]
    return " ".join(filter(None, names))
