"""Memory of a training: how many rows run together, and whether the insides of blocks are computed again."""

import math
from collections.abc import Sequence
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import nn

from secateur.base.device import memory_of
from secateur.base.errors import SecateurError
from secateur.base.memory import parse_memory, rss_bytes
from secateur.base.words import format_count
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.families.registry import experts_of, family_of
from secateur.model.units.experts import experts_per_token
from secateur.retraining.adapters import entries_trained
from secateur.retraining.halved import can_halve
from secateur.retraining.loss import LOGITS_AT_ONCE
from secateur.retraining.options import Training

STATES = 16
"""Bytes per trained parameter in float32: the weight, its gradient and two moments of AdamW."""
AT_ONCE = 4
"""Number of copies of the largest block that a process needs if several divide the blocks: weights of a block and of
the next, what was sent of them, and gradients."""
TOKEN_BYTES = 8
"""Bytes of a token id, of which all rows are in memory."""
LOSS_BYTES = 12
"""Bytes per logit of the part of the loss that is computed at once."""
KEPT = 1.5
"""Number of values kept for the backward pass, divided by the number of inputs and outputs of all matrices. Activation
functions and attention keep values too."""
GPU_SHARE = "80%"
"""Share of a GPU's free memory to use by default; the rest is for the workspace of its libraries."""


class MemoryPlan(NamedTuple):
    """Way to run a step so that it fits into the memory."""

    rank: int
    """Rank of the adapters; 0 if all weights of the blocks are trained."""
    halved: bool
    """Whether all weights of the blocks, their gradients and moments are bfloat16."""
    micro_batch: int
    """Rows that run through the network together."""
    recompute: bool
    """Whether only the inputs of blocks are kept for the backward pass; it takes one forward pass more."""
    bytes: float
    """Bytes that the process is expected to need on the device."""
    spare_bytes: int = 0
    """Bytes of the machine's memory that it may take beyond them, for activations and targets of the teacher."""

    @property
    def way(self) -> tuple[int, bool, int, bool]:
        """Rank, dtype, rows that run together, and whether blocks are computed again: what decides the result."""
        return self[:4]

    def describe(self, training: Training, trained: int) -> str:
        """Return a note about what is trained, why, and in how much memory.

        Args:
            training: The options; their rank is None if it is chosen.
            trained: Number of trained parameters.
        """
        what = f"adapters of rank {self.rank}" if self.rank else "all weights of the blocks"
        why = ", as all weights do not fit into memory," if self.rank and training.rank is None else ""
        what += " in bfloat16" if self.halved else ""
        how = ", which recomputes activations of blocks" if self.recompute else ""
        return f"Training {what}{why} ({format_count(trained)} parameters) in about {self.bytes / 1e9:,.1f} GB{how}"


def plan_memory(
    checkpoint: Checkpoint,
    network: Any,
    training: Training,
    *,
    device: torch.device,
    products: torch.dtype,
    processes: int,
    memory: str | None,
    way: Sequence[int] = (),
) -> MemoryPlan:
    """Return the best way to run a step that fits: of the ranks that the training allows, the first one that does.

    Args:
        checkpoint: The pruned model.
        network: The same model without weights.
        training: Rank, batch and length.
        device: Device of the training, whose memory is planned.
        products: Dtype of matrix products.
        processes: Number of processes, which divide the batch and the blocks.
        memory: Most memory that the process may take; see `parse_memory`. By default half of the free memory, or
            `GPU_SHARE` of a GPU's; if that is too little for the smallest plan, as much as this plan needs.
        way: `MemoryPlan.way` with which the run began; other rows run together only if the number of processes has
            changed.

    Raises:
        SecateurError: One row at a time, or the way in which the run began, needs more than that.
    """
    on_gpu = device.type == "cuda"
    held, available = memory_of(device)
    limit = parse_memory(GPU_SHARE if memory is None and on_gpu else memory, available)
    halvable = can_halve(network, family_of(network.config).blocks, products)
    for rank, halved in [way[:2]] if way else training.ways:
        if halved and not halvable:
            continue
        plans = _plans(network, rank, bool(halved), training, products, processes, held)
        plans = [plan for plan in plans if plan.way[2:] == tuple(way[2:])] or plans
        least = plans[-1].bytes
        allowed = limit if memory is not None else max(limit, min(round(least), available))
        if found := next((plan for plan in plans if plan.bytes <= allowed), None):
            spare = max(0, parse_memory(None) - rss_bytes()) if on_gpu else allowed - found.bytes
            return found._replace(spare_bytes=round(spare))
    advice = "" if training.rank != 0 else ", or train adapters with --rank 16, which need less"
    # Rounded up, with room for what differs from one start of Python to the next.
    enough = math.ceil(1.02 * least / 1e7) / 100
    raise SecateurError(
        f"training {checkpoint.source} needs at least {enough:,.2f} GB, but {allowed / 1e9:,.2f} GB are allowed; "
        f"raise --memory{advice}"
    )


def _plans(
    network: Any, rank: int, halved: bool, training: Training, products: torch.dtype, processes: int, held: int
) -> list[MemoryPlan]:
    """Return all ways to run a step with adapters of one rank; the fastest is first and the smallest last.

    `held` is the number of bytes that this process holds now.
    """
    share = training.batch // processes
    fixed = held + fixed_bytes(network, rank, products, processes, halved) + TOKEN_BYTES * training.token_count
    whole, outside = _row_bytes(network, training.length, products)
    divisors = {size for size in range(1, isqrt(share) + 1) if share % size == 0}
    sizes = sorted(divisors | {share // size for size in divisors}, reverse=True)
    # Keeping everything is faster than larger products; recomputing is the last resort.
    plans = [MemoryPlan(rank, halved, size, False, fixed + size * whole) for size in sizes]
    return plans + [MemoryPlan(rank, halved, size, True, fixed + size * outside) for size in sizes]


def fixed_bytes(network: Any, rank: int, products: torch.dtype, processes: int = 1, halved: bool = False) -> float:
    """Return the bytes of weights, their states and the loss in one of several processes."""
    blocks = network.get_submodule(family_of(network.config).blocks)
    trained, inside = entries_trained(network, rank), _entries(blocks)
    outside, frozen = _entries(network) - inside, inside if rank else 0
    divided = frozen * products.itemsize + trained * STATES / (2 if halved else 1)
    # Products of the largest block, in the dtype in which its weights are kept.
    largest = max(map(_entries, blocks.children())) * (products.itemsize if rank else 4)
    gathered = 0 if processes == 1 else AT_ONCE * largest
    vocabulary = network.get_output_embeddings().weight.shape[0]
    logits = max(LOGITS_AT_ONCE, vocabulary) * LOSS_BYTES
    return outside * products.itemsize + divided / processes + gathered + logits


def _entries(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def _row_bytes(network: Any, length: int, products: torch.dtype) -> tuple[float, float]:
    """Return the bytes that one row takes: with all insides of blocks, and with the inputs of blocks and one block."""
    width = network.config.hidden_size
    layers = [*network.get_submodule(family_of(network.config).blocks).children()]
    mixture = experts_of(network.config)
    used = 1 if mixture is None else experts_per_token(network.config, mixture)
    attention = _attention_bytes(network.config, length, products)
    stream, inside = 4 * width, [attention + _inside_bytes(layer, width, products, used) for layer in layers]
    return length * (len(layers) * stream + sum(inside)), length * (len(layers) * stream + max(inside))


def _attention_bytes(config: Any, length: int, products: torch.dtype) -> float:
    """Return the bytes per token of the attention probabilities that a block keeps for the backward pass.

    Fused attention computes them again. Otherwise they are kept once in float32, and twice as they are multiplied.
    """
    is_fused = config._attn_implementation != "eager"
    return 0.0 if is_fused else config.num_attention_heads * length * (4 + 2 * products.itemsize)


def _inside_bytes(layer: nn.Module, width: int, products: torch.dtype, used: int) -> float:
    """Return the bytes per token that a block keeps for the backward pass; a token uses `used` experts."""
    # Matrices of experts have three dimensions, of which the first counts experts.
    matrices = [value for value in layer.parameters() if value.dim() >= 2]
    kept = sum(sum(value.shape[-2:]) * (used if value.dim() == 3 else 1) for value in matrices)
    norms = 4 * 4 * width
    return KEPT * products.itemsize * kept + norms
