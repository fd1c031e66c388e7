"""What a plan takes (parameters, bytes, cache, time), as a sum over modules: a knapsack can be solved over it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from secateur.base.errors import SecateurError
from secateur.base.progress import Watcher
from secateur.base.words import format_count
from secateur.model.axes import Width
from secateur.model.facts import head_dim, latent_width
from secateur.model.stream import BlockStream
from secateur.model.units.heads import KV_GROUPS
from secateur.plan.latency import Timer, measured
from secateur.plan.target import SPEEDUPS, Target


@dataclass(frozen=True)
class Meter:
    """What each module takes at each width, in one unit; what a model takes is their sum and `fixed`."""

    dense_widths: tuple[Width, ...]
    """The dense width of every block."""
    fixed: float
    """What everything outside the prunable modules takes, norms and output biases included."""
    module_size: Callable[[int, str, Width], float]
    """What the attention (`heads`) or the feed-forward (`channels`) of a block takes at a width; zero is legal."""
    format_value: Callable[[float], str]
    """A value with its unit, for people."""
    bias_sizes: tuple[float, ...] = ()
    """What the biases that a recovery adds to a block take, for every block; nothing by default."""

    def total(self, widths: Mapping[int, Width]) -> float:
        """What the model takes at some widths, with what a recovery adds; blocks that are absent are dense."""
        now = [(i, dense.kinds, widths.get(i, dense)) for i, dense in enumerate(self.dense_widths)]
        parts = (self.module_size(i, kind, width) for i, kinds, width in now for kind in kinds)
        return self.fixed + sum(parts) + (sum(self.bias_sizes[i] for i in widths) if self.bias_sizes else 0)

    @property
    def dense(self) -> float:
        """What the dense model takes."""
        return self.total({})


def meter_of(
    target: Target,
    stream: BlockStream,
    *,
    output_bytes: Callable[[], Meter],
    dtype: torch.dtype,
    device: torch.device,
    watcher: Watcher,
    biases: bool = False,
) -> Meter:
    """Return the meter that a target is about; for `ppl` there is none, as it is no sum over modules.

    `output_bytes` gives the meter of the output format.
    """
    if target.quantity == "params":
        return parameter_meter(stream, biases)
    if target.quantity == "active":
        return active_meter(stream, biases)
    if target.quantity == "bytes":
        return output_bytes()
    assert target.quantity != "ppl"
    if stream.beside.lent:
        raise SecateurError(
            f"target {target}: blocks attend with keys and values of others, so that what one of them takes cannot be "
            "told apart; give params or bytes"
        )
    if target.quantity == "kv":
        return cache_meter(stream, dtype)
    if any(block.width.experts for block in stream.blocks):
        raise SecateurError(
            f"target {target}: how long experts take depends on where tokens go, and is not measured; give params, "
            "bytes or kv"
        )
    if any(block.attention.is_token_mixer for block in stream.blocks):
        raise SecateurError(
            f"target {target}: how long the layers in the attention's place of some blocks take is not "
            "measured; give params, bytes or kv"
        )
    return latency_meter(stream, target.quantity, device, dtype, watcher)


def parameter_meter(stream: BlockStream, biases: bool = False) -> Meter:
    """Parameters of the whole model as stored: tied ones once.

    With `biases`, level-2 layers of pruned blocks get one where they have none, unless a norm follows.
    """
    stored = sum(info.entries for info in stream.checkpoint.weights.values())
    inside = sum(block.module_parameters(block.width, kind) for block in stream.blocks for kind in block.kinds)
    return Meter(
        dense_widths(stream),
        stored - inside,
        module_size=lambda index, kind, width: stream.blocks[index].module_parameters(width, kind),
        format_value=lambda value: f"{format_count(value, 1)} parameters",
        bias_sizes=added_biases(stream) if biases else (),
    )


def active_meter(stream: BlockStream, biases: bool = False) -> Meter:
    """Parameters that a token meets: of experts, those that it is routed to; else all, as `parameter_meter` has it."""
    every = parameter_meter(stream, biases)
    return replace(
        every,
        module_size=lambda index, kind, width: stream.blocks[index].active_parameters(width, kind),
        format_value=lambda value: f"{format_count(round(value), 1)} active parameters",
    )


def byte_meter(stream: BlockStream, dtype: torch.dtype, biases: bool = False) -> Meter:
    """Return the meter of the bytes of all weights, stored in one dtype; for `biases` see `parameter_meter`."""
    counts = parameter_meter(stream, biases)
    # What is no floating-point number is copied as it is.
    others = [info for info in stream.checkpoint.weights.values() if not info.dtype.is_floating_point]
    fixed = counts.fixed * dtype.itemsize + sum(info.bytes - info.entries * dtype.itemsize for info in others)
    added = tuple(value * dtype.itemsize for value in counts.bias_sizes)
    return Meter(counts.dense_widths, fixed, lambda *at: counts.module_size(*at) * dtype.itemsize, megabytes, added)


def cache_meter(stream: BlockStream, dtype: torch.dtype) -> Meter:
    """Bytes of the keys and values of one token in all blocks."""
    config = stream.checkpoint.config
    latent = latent_width(config)
    entry = 2 * head_dim(config) * dtype.itemsize

    def module(index: int, kind: str, width: Width) -> float:
        one = stream.blocks[index].module(kind)
        if KV_GROUPS not in one.removed or not width[KV_GROUPS] or one.is_token_mixer:
            return 0
        return width[KV_GROUPS] * entry if latent is None else latent * dtype.itemsize

    return Meter(
        dense_widths(stream),
        fixed=0,
        module_size=module,
        format_value=lambda value: f"{value:,.0f} B per token",
    )


def latency_meter(
    stream: BlockStream,
    kind: Literal["prefill", "decode"],
    device: torch.device,
    dtype: torch.dtype,
    watcher: Watcher,
    timer: Timer | None = None,
) -> Meter:
    """Seconds on this machine, measured module by module: of a prompt of 512 tokens, or of one token behind as many.

    Device and dtype are those in which the pruned model will run. Measuring takes seconds the first time; a timer
    takes the clock's place.
    """
    # One table for all blocks of the same shape; the first one stands for them.
    shapes = [block.shapes for block in stream.blocks]
    first = [shapes.index(own) for own in shapes]
    tables = {index: measured(stream, index, kind, device, dtype, watcher, timer) for index in sorted(set(first))}
    own = [tables[index] for index in first]
    return Meter(
        dense_widths(stream),
        fixed=own[0].outside + sum(table.rest for table in own),
        module_size=lambda index, kind, width: own[index].module(
            list(stream.blocks[index].module(kind).removed), width
        ),
        format_value=lambda value: f"{1e3 * value:,.1f} ms",
    )


def budget_of(target: Target, meter: Meter) -> float:
    """The most that a plan may take, in the meter's unit.

    Raises:
        SecateurError: the dense model takes no more.
    """
    dense = meter.dense
    if target.quantity in SPEEDUPS:
        return dense / target.value
    if target.relative:
        return dense * target.value
    if target.value >= dense:
        less = Target(target.quantity, 0.8, True)
        raise SecateurError(
            f"target {target}: the dense model takes no more than {meter.format_value(dense)}; ask for less, such as "
            f"{less}"
        )
    return target.value


def unreachable_error(target: Target, meter: Meter, least: float) -> SecateurError:
    """What to raise where no plan meets a target, with the nearest one that can be met.

    `least` is the least that any plan takes, in the meter's unit.
    """
    dense = meter.dense
    nearest = _nearest(target, dense, least)
    if nearest is None:
        return SecateurError(
            f"target {target}: what may be pruned here changes nothing of it; let other modules go too"
        )
    return SecateurError(
        f"target {target} is out of reach: the least is {meter.format_value(least)}, and the dense model takes "
        f"{meter.format_value(dense)}; ask for {nearest}, or let more go"
    )


def _nearest(target: Target, dense: float, least: float) -> Target | None:
    """The closest target that can be met, rounded to figures that people write; None if nothing can be gained."""
    if target.quantity in SPEEDUPS:
        ratio = math.floor(100 * dense / least) / 100
        return Target(target.quantity, ratio, True) if ratio > 1 else None
    if target.relative:
        share = max(1, math.ceil(1000 * least / dense)) / 1000
        return Target(target.quantity, share, True) if share < 1 else None
    step = 10.0 ** (math.floor(math.log10(least)) - 2) if least > 0 else 1.0
    value = max(1.0, math.ceil(least / step) * step)
    value = value if value < dense else math.ceil(least)
    return Target(target.quantity, value, False) if value < dense else None


def dense_widths(stream: BlockStream) -> tuple[Width, ...]:
    """Return the dense width of every block."""
    return tuple(block.width for block in stream.blocks)


def added_biases(stream: BlockStream) -> tuple[float, ...]:
    """Count the entries of the biases that a recovery adds to the output projections of each block."""
    new = ([m for m in block.modules if m.may_gain_bias and not m.bias] for block in stream.blocks)
    return tuple(float(len(modules) * stream.width) for modules in new)


def megabytes(value: float) -> str:
    """Return bytes as people read them."""
    return f"{value / 1e6:,.1f} MB"
