"""Meters: the size of a model at given widths, in parameters, bytes, cache or time, as a sum over modules.

Because sizes are sums over modules, the best widths within a budget are the solution of a knapsack problem.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from secateur.base.errors import SecateurError
from secateur.base.progress import Watcher
from secateur.base.words import format_count
from secateur.checkpoints.facts import latent_width
from secateur.families.registry import family_of
from secateur.model.axes import Width
from secateur.model.stream import BlockStream
from secateur.model.units.heads import KV_GROUPS
from secateur.plan.latency import latency_table
from secateur.plan.target import SPEEDUPS, Target


@dataclass(frozen=True)
class Meter:
    """Size of each module at each width, in one unit; the size of a model is their sum plus a constant."""

    dense_widths: tuple[Width, ...]
    """Dense width of every block."""
    fixed: float
    """Size of everything outside the prunable modules, such as embeddings, norms and biases of output projections."""
    module_size: Callable[[int, str, Width], float]
    """Function that returns the size of one module.

    Its arguments are the index of the block, the kind of the module's units and the width of the block.
    """
    format_value: Callable[[float], str]
    """Function that formats a size with its unit for users."""
    bias_sizes: tuple[float, ...] = ()
    """Size of the biases that recovery adds to each block when the block is pruned; empty if recovery adds none."""
    cut_tokens: float = 0
    """Size of the tokens that were cut from the vocabulary."""

    def total(self, widths: Mapping[int, Width]) -> float:
        """Return the size of the model at the given widths, including biases that recovery adds.

        Args:
            widths: Width of each pruned block, by its index. All other blocks stay dense.
        """
        current = [(index, dense.kinds, widths.get(index, dense)) for index, dense in enumerate(self.dense_widths)]
        modules = (self.module_size(index, kind, width) for index, kinds, width in current for kind in kinds)
        return self.fixed + sum(modules) + (sum(self.bias_sizes[index] for index in widths) if self.bias_sizes else 0)

    @property
    def dense(self) -> float:
        """Size of the model with dense blocks."""
        return self.total({})

    @property
    def original(self) -> float:
        """Size of the model with dense blocks and its whole vocabulary."""
        return self.dense + self.cut_tokens


def meter_of(
    target: Target,
    stream: BlockStream,
    of_output: Mapping[str, Callable[[], Meter]],
    dtype: torch.dtype,
    watcher: Watcher,
    biases: bool = False,
) -> Meter:
    """Return the meter of the quantity that a target limits.

    Args:
        target: Any target but `ppl`: perplexity is not a sum over modules.
        stream: The open model.
        of_output: Functions that return the meters of `bytes` and of `kv` in the output format.
        dtype: Dtype in which the pruned model will run.
        watcher: Display of progress while time is measured.
        biases: Whether recovery adds biases; see `parameter_meter`.

    Raises:
        SecateurError: The quantity cannot be measured for this model.
    """
    if target.quantity in ("prefill", "decode"):
        if (reason := _untimed_reason(stream)) is not None:
            raise SecateurError(f"target {target}: {reason}; use params, bytes or kv")
        return latency_meter(stream, target.quantity, dtype, watcher)
    counts = {"params": parameter_meter, "active": active_meter}
    name = target.quantity
    return counts[name](stream, biases) if name in counts else of_output[name]()


def _untimed_reason(stream: BlockStream) -> str | None:
    """Return why the time of a model's blocks cannot be measured one by one; None if it can."""
    if stream.side_inputs.stores:
        return "some blocks attend to keys and values of other blocks, so that one block cannot be measured alone"
    if any(module.experts_per_token for block in stream.blocks for module in block.modules):
        return "the time of experts depends on the tokens that are routed to them and is not measured"
    if any(KV_GROUPS not in block.width for block in stream.blocks):
        return "the time of token mixers, such as linear attention, is not measured"
    return None


def parameter_meter(stream: BlockStream, biases: bool = False) -> Meter:
    """Return the meter of the parameters of the whole model; tied weights count once.

    Args:
        stream: The open model.
        biases: Whether recovery adds a bias to each output projection of a pruned block that has none. An output
            projection that a norm follows never gets a bias.
    """
    buffers = stream.checkpoint.buffers_of(stream.model)
    stored = sum(info.entries for name, info in stream.checkpoint.weights.items() if name not in buffers)
    prunable = sum(block.module_parameters(block.width, kind) for block in stream.blocks for kind in block.kinds)
    return Meter(
        dense_widths(stream),
        stored - prunable,
        module_size=lambda index, kind, width: stream.blocks[index].module_parameters(width, kind),
        format_value=lambda value: f"{format_count(value, 1)} parameters",
        bias_sizes=added_biases(stream) if biases else (),
        cut_tokens=stream.checkpoint.cut_entries,
    )


def active_meter(stream: BlockStream, biases: bool = False) -> Meter:
    """Return the meter of active parameters: those that take part in computing one token.

    Experts that the router does not choose for a token are not active. All other parameters count as in
    `parameter_meter`.
    """
    return replace(
        parameter_meter(stream, biases),
        module_size=lambda index, kind, width: stream.blocks[index].active_parameters(width, kind),
        format_value=lambda value: f"{format_count(round(value), 1)} active parameters",
    )


def byte_meter(stream: BlockStream, dtype: torch.dtype, biases: bool = False) -> Meter:
    """Return the meter of the bytes of all tensors, stored in one dtype except for those that keep their own.

    For `biases` see `parameter_meter`.
    """
    kept, weights = stream.kept_dtypes, stream.checkpoint.weights
    itemsizes = {
        name: info.dtype.itemsize if name in kept or not info.dtype.is_floating_point else dtype.itemsize
        for name, info in weights.items()
    }
    # Tensors inside blocks that do not keep their dtype are not listed.
    inside = [
        {name: itemsizes[stream.pieces(index, name)[0]] for name in block.shapes if stream.keeps_dtype(index, name)}
        for index, block in enumerate(stream.blocks)
    ]

    def module_bytes(index: int, kind: str, width: Width) -> int:
        shapes = stream.blocks[index].shapes_at(width, kind).items()
        return sum(math.prod(shape) * inside[index].get(name, dtype.itemsize) for name, shape in shapes)

    dense = dense_widths(stream)
    whole = sum(info.entries * itemsizes[name] for name, info in weights.items())
    return Meter(
        dense,
        whole - sum(module_bytes(index, kind, width) for index, width in enumerate(dense) for kind in width.kinds),
        module_bytes,
        megabytes,
        tuple(entries * dtype.itemsize for entries in added_biases(stream)) if biases else (),
        stream.checkpoint.cut_entries * dtype.itemsize,
    )


def cache_meter(stream: BlockStream, dtype: torch.dtype) -> Meter:
    """Return the meter of the KV cache: bytes of the keys and values of one token in all blocks."""
    config, family = stream.checkpoint.config, family_of(stream.checkpoint.config)
    latent, keys = latent_width(config), f"{family.attention}.{family.keys}.weight"
    has_key_layer = latent is None and family.fused is None

    def module_size(index: int, kind: str, width: Width) -> float:
        block, module = stream.blocks[index], stream.blocks[index].module(kind)
        # A block without a key layer attends to the keys and values of an earlier block.
        if KV_GROUPS not in module.removed or (has_key_layer and keys not in block.shapes):
            return 0
        # In latent attention, one vector per token holds the keys and values of all heads.
        group = block.shapes.get(keys, (module.groups * module.size,))[0] // module.groups
        entries = width[KV_GROUPS] * 2 * group if latent is None else latent
        # transformers reads the length of the text from any block's cache: without heads, that has two numbers.
        return (entries if width[KV_GROUPS] else 2) * dtype.itemsize

    return Meter(
        dense_widths(stream),
        fixed=0,
        module_size=module_size,
        format_value=lambda value: f"{value:,.0f} B per token",
    )


def latency_meter(
    stream: BlockStream,
    kind: Literal["prefill", "decode"],
    dtype: torch.dtype,
    watcher: Watcher,
) -> Meter:
    """Return the meter of seconds on this machine, measured module by module.

    The first measurement takes some seconds; results are cached on disk.

    Args:
        stream: The open model.
        kind: `prefill` for a prompt of 512 tokens; `decode` for one token with 512 tokens in the cache.
        dtype: Dtype in which the pruned model will run.
        watcher: Display of progress.
    """
    # Blocks with the same shapes share one table, which is measured on the first of them.
    shapes = [block.shapes for block in stream.blocks]
    first = [shapes.index(shape) for shape in shapes]
    tables = {index: latency_table(stream, index, kind, dtype, watcher) for index in sorted(set(first))}
    of_block = [tables[index] for index in first]
    return Meter(
        dense_widths(stream),
        fixed=of_block[0].model_overhead + sum(table.block_overhead for table in of_block),
        module_size=lambda index, kind, width: of_block[index].module_seconds(
            list(stream.blocks[index].module(kind).removed), width
        ),
        format_value=lambda value: f"{1e3 * value:,.1f} ms",
    )


def budget_of(target: Target, meter: Meter) -> float:
    """Return the largest size that a target allows, in the meter's unit.

    Raises:
        SecateurError: The model is within the target before any block is pruned.
    """
    original = meter.original
    if target.quantity in SPEEDUPS:
        return original / target.value
    budget = original * target.value if target.relative else target.value
    if budget >= original:
        raise SecateurError(
            f"target {target}: the dense model is within it already, with {meter.format_value(original)}; request "
            f"less, for example {Target(target.quantity, 0.8, True)}"
        )
    if budget >= meter.dense:
        raise SecateurError(
            f"target {target} needs no block to be pruned, because the smaller vocabulary leaves "
            f"{meter.format_value(meter.dense)}; use secateur trim, or request less"
        )
    return budget


def dense_widths(stream: BlockStream) -> tuple[Width, ...]:
    """Return the dense width of every block."""
    return tuple(block.width for block in stream.blocks)


def added_biases(stream: BlockStream) -> tuple[float, ...]:
    """Return the number of bias entries that recovery adds to the output projections of each block."""
    biased = (
        [module for module in block.modules if module.may_gain_bias and not module.bias] for block in stream.blocks
    )
    return tuple(float(len(modules) * stream.width) for modules in biased)


def megabytes(value: float) -> str:
    """Format a number of bytes as megabytes."""
    return f"{value / 1e6:,.1f} MB"
