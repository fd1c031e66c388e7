"""How long this machine takes for each module at several widths: measured on transformers' own layers, and kept.

A model of one layer with random weights is built from the config. Copies of the layer are cut to a grid of widths of
one module, with the other module taken away, and timed in turns, as a busy machine slows neighbouring runs alike. A
module's time is what its layer takes beyond one without either module; between the widths of the grid it is
interpolated.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import platform
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Annotated, Any, Literal

import numpy as np
import torch
import transformers
from pydantic import AfterValidator, Field, TypeAdapter
from torch import nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache

from secateur.base.errors import SecateurError
from secateur.base.files import cache_folder, write_atomically
from secateur.base.hashes import hash_json
from secateur.base.json_files import parse_json
from secateur.base.progress import Watcher
from secateur.base.quiet import quiet
from secateur.model.axes import Axis, Width
from secateur.model.facts import positions_of
from secateur.model.stream import BlockStream
from secateur.model.structure import PrunableModule
from secateur.model.surgery import cut_down

LENGTH = 512
"""Tokens of the prompt, and in the cache of a decode step, where the model has positions for them."""
POINTS = 10
"""Widths of the grid along channels, zero included; along heads there may be two more."""
SECONDS = 5.0
"""Most time to spend on one table once every run has been taken; shorter where the medians settle earlier."""
ROUNDS = 5
"""Fewest rounds before medians can have settled."""
SETTLED = 0.01
"""Standard error of a settled median, relative to it."""
_FLUSH = 2**28
"""Bytes beyond which no processor's caches hold anything of what was before."""
_LAYOUT = 2
"""Part of the cache key; to be raised when the way of measuring changes."""

Run = Callable[[], object]
Case = Callable[[], Run]
"""Makes everything ready for a run and returns the run, which is then timed."""
Timer = Callable[[Case], float]
"""Seconds of one run."""


def _ascending(line: Line) -> Line:
    """A line as it is; `ValueError` for one that does not rise from zero."""
    if line[0] != (0, 0.0) or any(a[0] >= b[0] or a[1] > b[1] for a, b in pairwise(line)):
        raise ValueError("it does not rise from zero")
    return line


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Line = Annotated[tuple[tuple[int, Seconds], ...], Field(min_length=2), AfterValidator(_ascending)]
"""(units, seconds), both ascending from zero units and zero seconds to the dense module's."""


@dataclass(frozen=True)
class Latency:
    """Seconds of what makes up a model with blocks of one shape; fields are checked where a file of them is read."""

    lines: dict[str, Line]
    """Seconds of a module over the numbers along each of its axes, the others dense."""
    rest: Seconds
    """Of a block without either module: its norms, and what transformers does around them."""
    outside: Seconds
    """Of embedding, masks, last norm and output matrix."""

    def module(self, axes: Sequence[str], width: Width) -> float:
        """Return the seconds of a module with these axes at a width; a narrower one never takes longer."""
        dense = self.lines[axes[0]][-1][1]
        # Axes were measured one at a time: where a module is narrower along two, each has its share.
        shares = [_between(self.lines[axis], width[axis]) / dense if dense else 0.0 for axis in axes]
        return dense * math.prod(shares)


def measured(
    stream: BlockStream,
    index: int,
    kind: Literal["prefill", "decode"],
    device: torch.device,
    dtype: torch.dtype,
    watcher: Watcher,
    timer: Timer | None = None,
) -> Latency:
    """The table for blocks like one of the dense model, from the user's cache, or measured and put there.

    It tells of one row: a prompt of `LENGTH` tokens, or one token behind as many. What a timer in place of the clock
    measures is not kept apart from what the clock does.
    """
    facts = _facts(stream, index, kind, device, dtype)
    file = cache_folder() / "latency" / f"{hash_json(facts)}.json"
    with suppress(OSError, ValueError):
        stored = parse_json(file.read_text(encoding="utf-8"))
        kept = TypeAdapter(Latency).validate_python(stored)
        if stored.get("facts") == facts:
            return kept
    with watcher.busy(f"Measuring how fast this machine runs a block ({kind})"):
        table = _measure(stream, index, kind, device, dtype, timer or stopwatch(device))
    # Where the folder cannot be written to, the next run measures again.
    with suppress(OSError, SecateurError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({**asdict(table), "facts": facts}, indent=1))
    return table


def stopwatch(device: torch.device) -> Timer:
    """The clock. A GPU works behind the program's back, so it is given several runs and waited for."""
    count, wait = (1, lambda: None) if device.type == "cpu" else (8, partial(torch.accelerator.synchronize, device))

    def timed(case: Case) -> float:
        runs = [case() for _ in range(count)]
        wait()
        start = perf_counter()
        for run in runs:
            run()
        wait()
        return (perf_counter() - start) / count

    return timed


def medians(cases: Sequence[Case], timer: Timer) -> list[float]:
    """The median seconds of each case, from rounds over all of them, until all have settled or time is up."""
    taken: list[list[float]] = [[] for _ in cases]
    for case in cases:
        # The first run of a shape prepares kernels and is no measurement.
        timer(case)
    start, order, dice = perf_counter(), list(range(len(cases))), random.Random(0)
    while True:
        # Whatever comes behind a large run is slower.
        dice.shuffle(order)
        for at in order:
            taken[at].append(timer(cases[at]))
        middles = [median(own) for own in taken]
        if perf_counter() - start > SECONDS or (len(taken[0]) >= ROUNDS and _settled(taken, middles)):
            return middles


def grid(full: int, points: int) -> list[int]:
    """At most so many counts from 0 to `full`, about evenly apart; in between, multiples of a power of two.

    Kernels are fastest at those, and what is rounded to them should be interpolated between such.
    """
    unit = next(unit for unit in (128, 64, 32, 16, 8, 4, 2, 1) if unit == 1 or full >= unit * (points - 1))
    inner = (unit * round(full * i / (points - 1) / unit) for i in range(1, points - 1))
    return sorted({0, full, *(count for count in inner if 0 < count < full)})


def _between(line: Line, units: int) -> float:
    return float(np.interp(units, [count for count, _ in line], [seconds for _, seconds in line]))


def _settled(taken: Sequence[Sequence[float]], middles: Sequence[float]) -> bool:
    """Whether every median is known well enough, by its standard error from the quartiles, which outliers leave alone.

    Well enough is for short runs what it is for the typical one, as they are only told from others by subtraction.
    """
    typical = median(middles)
    quarters = (quantiles(own, n=4) for own in taken)
    errors = [0.93 * (upper - lower) / len(taken[0]) ** 0.5 for lower, _, upper in quarters]
    return all(error <= SETTLED * max(middle, typical) for error, middle in zip(errors, middles, strict=True))


@torch.inference_mode()
def _measure(
    stream: BlockStream, index: int, kind: str, device: torch.device, dtype: torch.dtype, timer: Timer
) -> Latency:
    block = stream.blocks[index]
    full = block.width
    model = _one_layer(stream, index, device, dtype)
    layers = model.get_submodule(stream.family.blocks)
    length = _length(model.config)
    prefill, decode = _calls(model, layers[0], length)

    def layer_case(width: Width) -> Case:
        layer = copy.deepcopy(layers[0])
        cut_down(layer, block, width)
        return _case(model, kind, partial(prefill, layer), partial(decode, layer))

    nothing = Width(dict.fromkeys(full, 0))
    lines = {axis.name: _line(module, axis, nothing) for module in block.modules for axis in module.axes}
    widths = dict.fromkeys(width for line in lines.values() for width in line.values())
    cases: dict[Width | None, Case] = {width: layer_case(width) for width in widths}
    # A layer of which little is left.
    small = layer_case(full | {m.axes[0].name: list(lines[m.axes[0].name])[1] for m in block.modules})
    # What is left of the model is timed around the layer without anything.
    cut_down(layers[0], block, nothing)
    cases[None] = _case(model, kind, _whole(model, length), _whole(model, 1))
    if kind == "decode" and device.type == "cpu":
        # A token reads every weight once, so a layer finds its weights pushed out of the processor's caches by the
        # others. A small layer then brings back what belongs to no weight.
        weights = sum(parameter.numel() for parameter in stream.model.parameters()) * dtype.itemsize
        others = torch.ones(min(_FLUSH, weights) // 4, dtype=torch.float32)

        def cold(case: Case) -> Run:
            others.sum()
            small()()
            return case()

        cases = {width: partial(cold, case) for width, case in cases.items()}
    seconds = dict(zip(cases, medians(list(cases.values()), timer), strict=True))
    # A dense module, where all its lines end, takes no less than a narrower one.
    for module in block.modules:
        own = [width for axis in module.axes for width in lines[axis.name].values()]
        seconds[own[-1]] = max(seconds[width] for width in own)
    rest = seconds[nothing]

    def rising(line: dict[int, Width]) -> Line:
        # Falls are noise: each is the largest value so far.
        beyond = np.maximum.accumulate([seconds[width] - rest for width in line.values()])
        return tuple(zip(line, beyond.tolist(), strict=True))

    outside = max(0.0, seconds[None] - rest)
    return Latency({name: rising(line) for name, line in lines.items()}, rest=rest, outside=outside)


def _line(module: PrunableModule, axis: Axis, nothing: Width) -> dict[int, Width]:
    """Return the widths to time along one axis by their number, all other modules gone."""
    # Up to a dozen numbers of heads, or none and all where single ones cannot go.
    points = 2 if axis.locked else POINTS if axis.rounded else POINTS + 2
    dense = {other.name: other.units for other in module.axes}
    return {0: nothing} | {number: nothing | dense | {axis.name: number} for number in grid(axis.units, points)[1:]}


def _one_layer(stream: BlockStream, index: int, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with one of its layers, on random weights."""
    config = copy.deepcopy(stream.checkpoint.config)
    config.num_hidden_layers = 1
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[index : index + 1]
    with quiet(), torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()


def _length(config: Any) -> int:
    """Tokens of a prompt that leaves room for one more."""
    positions = positions_of(config)
    return LENGTH if positions is None else max(1, min(LENGTH, positions - 1))


def _calls(model: Any, layer: nn.Module, length: int) -> list[Callable[[nn.Module, Cache], Run]]:
    """What the model hands to a layer for a prompt and for one token behind it, as runs of any layer with any cache."""
    calls: list[Callable[[nn.Module, Cache], Run]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        def call(other: nn.Module, cache: Cache) -> Run:
            own = [cache if isinstance(value, Cache) else value for value in args]
            named = {key: cache if isinstance(value, Cache) else value for key, value in kwargs.items()}
            return partial(other, *own, **named)

        calls.append(call)

    cache = DynamicCache(config=model.config)
    with layer.register_forward_pre_hook(note, with_kwargs=True):
        _whole(model, length)(cache)()
        _whole(model, 1)(cache)()
    return calls


def _whole(model: Any, count: int) -> Callable[[Cache], Run]:
    """Runs of the whole model on random tokens as in generation, with logits of the last one alone."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0)).to(model.device)
    # transformers has begun to rename it.
    key = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return lambda cache: partial(model, ids, **{key: cache}, use_cache=True, logits_to_keep=1)


def _case(model: Any, kind: str, prompt: Callable[[Cache], Run], token: Callable[[Cache], Run]) -> Case:
    """A run on a prompt, or on one token behind it, each with a cache of its own."""
    if kind == "prefill":
        return lambda: prompt(DynamicCache(config=model.config))
    cache = DynamicCache(config=model.config)
    prompt(cache)()

    def ready() -> Run:
        # What is in the cache is shared; the run may append to its copy.
        fresh = copy.copy(cache)
        fresh.layers = [copy.copy(layer) for layer in cache.layers]
        return token(fresh)

    return ready


def _facts(stream: BlockStream, index: int, kind: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """All that a table depends on, ready for JSON."""
    config, block = stream.checkpoint.config, stream.blocks[index]
    inside, kinds = f"{stream.family.blocks}.", getattr(config, "layer_types", None)
    return {
        "layout": _LAYOUT,
        "kind": kind,
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model_type": config.model_type,
        "attention": getattr(stream.model.config, "_attn_implementation", None),
        "layer_type": kinds[index] if kinds else None,
        "window": getattr(config, "sliding_window", None),
        "length": _length(config),
        "width": dict(block.width),
        "block": {name: list(shape) for name, shape in block.shapes.items()},
        "others": {n: list(p.shape) for n, p in stream.model.named_parameters() if not n.startswith(inside)},
    }


def _device_name(device: torch.device) -> str:
    """The make of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [device.type, platform.machine(), platform.processor()]
    with suppress(OSError):
        # Linux leaves `platform.processor` empty.
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("model name")][:1]
    return " ".join(filter(None, names))
