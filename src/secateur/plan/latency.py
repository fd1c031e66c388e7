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
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache

from secateur.base.errors import SecateurError
from secateur.base.files import cache_folder, digest, parse_json, write_whole
from secateur.base.progress import Watcher
from secateur.base.quiet import quiet
from secateur.model.families import positions_of
from secateur.model.modeling_secateur import resize
from secateur.model.stream import BlockStream
from secateur.model.structure import Kind, Width

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

_LAYOUT = 1
"""Part of the cache key; to be raised when the way of measuring changes."""

Case = Callable[[], Callable[[], object]]
"""Makes everything ready for a run and returns the run, which is then timed."""
_WithCache = Callable[[Cache], Callable[[], object]]
"""Makes a run of a cache."""
Timer = Callable[[Case], float]
"""Seconds of one run."""
Line = tuple[tuple[int, float], ...]
"""(units, seconds), both ascending from zero units and zero seconds to the dense module's."""


@dataclass(frozen=True)
class Latency:
    """Seconds of what makes up a model with blocks of one shape."""

    groups: Line
    """The attention over key/value groups, each with all its query heads."""
    per_group: Line
    """The attention over query heads in each group, with all groups."""
    channels: Line
    rest: float
    """Of a block without either module: its norms, and what transformers does around them."""
    outside: float
    """Of embedding, masks, last norm and output matrix."""

    def module(self, kind: Kind, width: Width) -> float:
        """Seconds of one module at a width; a narrower one never takes longer."""
        if kind == "channels":
            return _between(self.channels, width.channels)
        if not width.heads:
            return 0.0
        # Groups and heads in each were measured apart; where some of both are gone, each has its share.
        dense = self.groups[-1][1]
        shares = _between(self.groups, width.groups) * _between(self.per_group, width.per_group)
        return shares / dense if dense else 0.0


def measured(
    stream: BlockStream,
    index: int,
    kind: Literal["prefill", "decode"],
    device: torch.device,
    dtype: torch.dtype,
    watcher: Watcher,
    timer: Timer | None = None,
) -> Latency:
    """The table for blocks like one, from the user's cache, or measured and put there.

    Args:
        stream: the open dense model; only its config and shapes are read.
        index: of the block.
        kind: a prompt of `LENGTH` tokens, or one token behind as many; one row either way.
        device: where to run.
        dtype: of weights and activations.
        watcher: told that measuring goes on.
        timer: in place of the clock; what it measures is not kept apart from what the clock does.
    """
    facts = _facts(stream, index, kind, device, dtype)
    file = cache_folder() / "latency" / f"{digest(facts)}.json"
    table = _read(file, facts)
    if table is None:
        with watcher.busy(f"Measuring how fast this machine runs a block ({kind})"):
            table = _measure(stream, index, kind, device, dtype, timer or stopwatch(device))
        _keep(file, facts, table)
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


@dataclass(frozen=True)
class _Call:
    """What a model hands to a layer, the cache aside."""

    hidden: torch.Tensor
    """The stream, (1, t, d)."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def ready(self, layer: nn.Module, cache: Cache) -> Callable[[], object]:
        """A run of a layer with a cache of its own."""
        args = [cache if isinstance(value, Cache) else value for value in self.args]
        kwargs = {key: cache if isinstance(value, Cache) else value for key, value in self.kwargs.items()}
        return lambda: layer(self.hidden, *args, **kwargs)


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
    # All counts of heads up to a dozen, or none and all where they are tied.
    every = 2 if block.attention.locked else POINTS + 2
    groups, per_group, channels = grid(full.groups, every), grid(full.per_group, every), grid(full.channels, POINTS)

    def layer_case(width: Width) -> Case:
        layer = copy.deepcopy(layers[0])
        resize(layer, width.heads, width.groups, width.channels)
        return _case(model, kind, partial(prefill.ready, layer), partial(decode.ready, layer))

    def cold(case: Case) -> Case:
        if kind == "prefill" or device.type != "cpu":
            return case

        def ready() -> Callable[[], object]:
            others.sum()
            small()()
            return case()

        return ready

    # A token reads every weight once, so a layer finds its weights pushed out of the processor's caches by the others.
    # A small layer then brings back what belongs to no weight.
    weights = sum(parameter.numel() for parameter in stream.model.parameters()) * dtype.itemsize
    others = torch.ones(min(_FLUSH, weights) // 4, dtype=torch.float32, device=device)
    small = layer_case(Width(groups[1], per_group[-1], channels[1]))
    along_groups = [Width(count, full.per_group, 0) for count in groups[1:]]
    along_heads = [Width(full.groups, count, 0) for count in per_group[1:]]
    nothing = Width(0, 0, 0)
    cases: dict[Width | None, Case] = {}
    for width in (nothing, *along_groups, *along_heads, *(Width(0, 0, count) for count in channels[1:])):
        cases[width] = cold(layer_case(width))
    # What is left of the model is timed around the layer without anything.
    resize(layers[0], 0, 0, 0)
    cases[None] = cold(_model_case(model, kind, length))
    seconds = dict(zip(cases, medians(list(cases.values()), timer), strict=True))

    rest = seconds[nothing]
    by_groups, by_heads = ([seconds[width] - rest for width in line] for line in (along_groups, along_heads))
    # Both lines end in the dense attention.
    by_groups[-1] = by_heads[-1] = max(by_groups + by_heads)
    return Latency(
        groups=_rising(groups, by_groups),
        per_group=_rising(per_group, by_heads),
        channels=_rising(channels, [seconds[Width(0, 0, count)] - rest for count in channels[1:]]),
        rest=rest,
        outside=max(0.0, seconds[None] - rest),
    )


def _rising(counts: Sequence[int], seconds: Sequence[float]) -> Line:
    """A line from zero units in no time, without the falls that are noise: each is the largest value so far."""
    return tuple(zip(counts, np.maximum.accumulate([0.0, *seconds]).tolist(), strict=True))


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


def _ids(model: Any, count: int) -> torch.Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


def _calls(model: Any, layer: nn.Module, length: int) -> tuple[_Call, _Call]:
    """What the model hands to a layer for a prompt, and for one token behind it."""
    calls: list[_Call] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(kwargs)
        hidden, *others = args or (named.pop("hidden_states"),)
        calls.append(_Call(hidden, tuple(others), named))

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        cache = DynamicCache(config=model.config)
        for count in (length, 1):
            _whole(model, _ids(model, count), cache)()
    finally:
        handle.remove()
    return calls[0], calls[1]


def _whole(model: Any, ids: torch.Tensor, cache: Cache) -> Callable[[], object]:
    """A run of the whole model as in generation, with logits of the last token alone."""
    # transformers has begun to rename it.
    key = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return partial(model, ids, **{key: cache}, use_cache=True, logits_to_keep=1)


def _model_case(model: Any, kind: str, length: int) -> Case:
    """The whole model on a prompt, or on one token behind it."""
    return _case(model, kind, partial(_whole, model, _ids(model, length)), partial(_whole, model, _ids(model, 1)))


def _case(model: Any, kind: str, prompt: _WithCache, token: _WithCache) -> Case:
    """A run on a prompt, or on one token behind it, each with a cache of its own."""
    if kind == "prefill":
        return lambda: prompt(DynamicCache(config=model.config))
    cache = DynamicCache(config=model.config)
    prompt(cache)()

    def ready() -> Callable[[], object]:
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
        "width": asdict(block.width),
        "block": {name: list(shape) for name, shape in block.shapes.items()},
        "others": {n: list(p.shape) for n, p in stream.model.named_parameters() if not n.startswith(inside)},
    }


def _device_name(device: torch.device) -> str:
    """The make of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [platform.machine(), platform.processor()]
    with suppress(OSError):
        # Linux leaves `platform.processor` empty.
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("model name")][:1]
    return f"{device.type} {' '.join(name for name in names if name)}"


def _read(file: Path, facts: dict[str, Any]) -> Latency | None:
    """A kept table; None if there is none, or one that is broken."""
    try:
        stored = parse_json(file.read_text(encoding="utf-8"))
        lines = {name: _line(stored[name]) for name in ("groups", "per_group", "channels")}
        table = Latency(**lines, rest=float(stored["rest"]), outside=float(stored["outside"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    sound = stored.get("facts") == facts and np.isfinite([table.rest, table.outside]).all()
    return table if sound and min(table.rest, table.outside) >= 0 else None


def _line(points: Any) -> Line:
    """A line from JSON; `ValueError` for what is none."""
    line = tuple((int(count), float(seconds)) for count, seconds in points)
    rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(line))
    if len(line) < 2 or line[0] != (0, 0.0) or not rising or not np.isfinite(line[-1][1]):
        raise ValueError("no line")
    return line


def _keep(file: Path, facts: dict[str, Any], table: Latency) -> None:
    """Put a table into the cache; where that cannot be, the next run measures again."""
    with suppress(OSError, SecateurError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({**asdict(table), "facts": facts}, indent=1))
