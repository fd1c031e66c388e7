"""Pruning methods that secateur is compared with, on the same calibration rows.

Each peer takes an open model, calibration rows and a sparsity (share of the blocks' parameters to remove), and returns
the pruned transformers network in float32 for evaluation in memory. All but `depth` and `depth_greedy` reach the
sparsity to about one channel; `kept_parameters` is the exact number of parameters left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.checkpoints.expert_matrices import BlockTensor, whole
from secateur.checkpoints.tokens import begins_with_bos
from secateur.criteria import flap
from secateur.criteria.order import remaining_units, removal_order
from secateur.criteria.registry import SCORED_KINDS, all_criteria
from secateur.criteria.statistics import Statistics
from secateur.fit.loop import refit
from secateur.fit.recovery import Method, recovery_of
from secateur.measure import perplexity
from secateur.measure.loading import load
from secateur.model.arena import Activations, Arena
from secateur.model.axes import Width
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.model.structure import Block, KeptUnits
from secateur.model.surgery import assign, kept_inputs, narrow, output_tensor, output_weight, slice_block
from secateur.model.units.channels import CHANNELS
from secateur.model.units.heads import HEADS_PER_GROUP, KV_GROUPS
from secateur.numerics.moments import Moments
from secateur.numerics.ridge import least_squares
from secateur.plan.problem import Plan
from secateur.text.calibration import calibration_rows

OBC_RIDGE = 0.3
"""Ridge of `uniform_obc`, relative to the energy of each input."""
PROBE_TOKENS = 512
"""Number of tokens on which `depth_greedy` scores each candidate network."""


@dataclass(frozen=True)
class Peer:
    """A pruned model in memory."""

    network: Any
    kept_parameters: int
    """Number of parameters of the blocks, including norms and added biases."""
    note: str


def wanda_sp(stream: BlockStream, rows: Rows, sparsity: float) -> Peer:
    """Prune by Wanda-sp: weights times input norms, at the same sparsity in every module, on the pruned stream."""
    return _through_refit(stream, rows, _uniform(stream, sparsity), Method("wanda", recovery_of("none")))


def flap_al_am(stream: BlockStream, rows: Rows, sparsity: float) -> Peer:
    """Prune by FLAP: adaptive widths from one dense pass, and biases that replace the mean output of removed channels.

    The authors also take the units and the means from the dense pass. Here both come from the pruned stream, which is
    better: 2.94 times the dense perplexity in place of 2.98 (setting: see `uniform_obc`).
    """
    return _through_refit(stream, rows, flap_widths(stream, rows, sparsity), Method("flap-wifv", recovery_of("bias")))


def uniform_obc(stream: BlockStream, rows: Rows, sparsity: float) -> Peer:
    """Prune by structured optimal brain surgeon, at the same sparsity in every module.

    The target of an output projection is the output of its dense weights on the pruned stream, so that errors of
    earlier modules are not corrected. The ridge is `OBC_RIDGE`, since that is better: 3.07 times the dense perplexity
    in place of 3.97 with the usual 0.01 of the mean diagonal (SmolLM2-135M-Instruct, sparsity 0.25, 16 x 128
    calibration tokens of WikiText-2, 2,048 scored tokens).
    """
    network, widths = _load(stream), _uniform(stream, sparsity)
    with Arena() as arena:
        hidden = stream.embed(rows, arena)
        for index, width in widths.items():
            with stream.filled(index) as layer:
                kept, changed = {}, {}
                for kind in SCORED_KINDS:
                    stats = _statistics(stream, index, layer, kind, rows, hidden)
                    kept[kind] = _cheapest(stats, width)
                    at = kept_inputs(stats.module, kept[kind])
                    full = torch.zeros_like(stats.weight_ao)
                    full[at] = least_squares(stats.normal, at)[0]
                    changed[stats.module.output_projection.name] = output_tensor(stats.module, full)
                    # An input with zero weights is the same as a removed one.
                    assign(layer, stats.module.output_projection.name, changed[stats.module.output_projection.name])
                _advance(stream, index, layer, rows, hidden)
                _cut(stream, network, index, kept, changed, width)
    return _peer(stream, network, f"{_spelled(widths)}, ridge {OBC_RIDGE}")


def depth(stream: BlockStream, rows: Rows, sparsity: float) -> Peer:
    """Prune by ShortGPT: remove the blocks whose output is most similar to their input in the dense model."""
    count = _blocks_to_remove(stream, sparsity)
    gone = block_influence(stream, rows).argsort(stable=True)[:count].tolist()
    network = _load(stream)
    _leave(stream, network, list(layers_of(stream, network)), [i for i in range(len(stream)) if i not in gone])
    return _peer(stream, network, f"without blocks {', '.join(map(str, sorted(gone)))}")


def depth_greedy(stream: BlockStream, rows: Rows, sparsity: float) -> Peer:
    """Prune by SLEB: remove one block after the other, each time the one whose removal raises the loss least."""
    network, gone = _load(stream), []
    layers = list(layers_of(stream, network))
    text = rows.groups[0]
    probe = text[: max(1, PROBE_TOKENS // text.shape[1])]
    left = list(range(len(layers)))
    for _ in range(_blocks_to_remove(stream, sparsity)):
        losses = {}
        for index in left:
            _leave(stream, network, layers, [i for i in left if i != index])
            losses[index] = perplexity(network, probe).nll
        gone.append(min(losses, key=lambda index: losses[index]))
        left.remove(gone[-1])
    _leave(stream, network, layers, left)
    return _peer(
        stream,
        network,
        f"without blocks {', '.join(map(str, sorted(gone)))}; {probe.numel()} tokens for each candidate",
    )


def optipfair(stream: BlockStream, _: Rows, sparsity: float) -> Peer:
    """Prune by OptiPFair with its defaults: channels only, by the range of their gate and up weights, without text.

    Raises:
        ImportError: the package is not installed (`pip install optipfair`).
    """
    return _optipfair(stream, sparsity, None)


def optipfair_calibrated(stream: BlockStream, rows: Rows, sparsity: float) -> Peer:
    """Prune by the data-driven variant of OptiPFair, which adds the down weights times the norm of their input.

    Raises:
        ImportError: the package is not installed (`pip install optipfair`).
    """
    return _optipfair(stream, sparsity, [{"input_ids": part} for part in rows.groups[0].split(8)])


def _optipfair(stream: BlockStream, sparsity: float, data: list[dict[str, Tensor]] | None) -> Peer:
    from optipfair import prune_model

    logging.getLogger("optipfair").setLevel(logging.WARNING)
    block, network = stream.blocks[0], _load(stream)
    width = _with_channels(block, block.width, sparsity)
    # The package rounds the number of removed channels down.
    percent = 100 * (block.width.channels - width.channels + 0.5) / block.width.channels
    pruned = prune_model(network, pruning_percentage=percent, dataloader=data, show_progress=False)
    return _peer(stream, pruned, _spelled({0: width}))


PEERS: dict[str, Callable[[BlockStream, Rows, float], Peer]] = {
    "wanda-sp": wanda_sp,
    "flap": flap_al_am,
    "uniform-obc": uniform_obc,
    "depth": depth,
    "depth-greedy": depth_greedy,
    "optipfair": optipfair,
    "optipfair-calibrated": optipfair_calibrated,
}


def pruned_by(
    name: str, stream: BlockStream, sparsity: float, calibration: str, *, samples: int, length: int, seed: int
) -> Peer:
    """Prune by a peer on calibration rows, drawn in the same way as for `secateur.prune`."""
    rows = rows_of(name, stream, calibration, samples=samples, length=length, seed=seed)
    return PEERS[name](stream, rows, sparsity)


def rows_of(name: str, stream: BlockStream, calibration: str, *, samples: int, length: int, seed: int) -> Rows:
    """Return the calibration rows of a peer."""
    tokenizer, vocabulary = stream.checkpoint.tokenizer(), stream.checkpoint.config.vocab_size
    rows = Rows.of(
        calibration_rows(tokenizer, calibration, samples=samples, length=length, seed=seed, vocab_size=vocabulary)
    )
    # As in `secateur.prune`, rows at position 0 are added only where something is fitted.
    if name == "uniform-obc" and not begins_with_bos(tokenizer):
        rows = rows.with_openings()
    return rows


# Widths.


def uniform_width(block: Block, sparsity: float) -> Width:
    """Return the width with equal sparsity in both modules: the nearest of the attention, and channels for the rest."""
    attention, dense = block.modules[0], block.width
    widths = [dense]
    if not attention.locked:
        widths += [(dense | {HEADS_PER_GROUP: heads}) for heads in range(1, dense.heads_per_group)]
        widths += [(dense | {KV_GROUPS: groups}) for groups in range(1, dense.kv_groups)]
    held = block.parameters - block.parameters_at(dense | {KV_GROUPS: 0, HEADS_PER_GROUP: 0})
    return _with_channels(
        block,
        min(widths, key=lambda w: abs(block.parameters - block.parameters_at(w) - sparsity * held)),
        sparsity,
    )


def _with_channels(block: Block, width: Width, sparsity: float) -> Width:
    """Return the width whose number of channels comes nearest to the block's sparsity."""
    wanted = (1 - sparsity) * block.parameters
    counts = range(1, block.width.channels + 1)
    best = min(counts, key=lambda c: abs(block.parameters_at(width | {CHANNELS: c}) - wanted))
    return width | {CHANNELS: best}


def _uniform(stream: BlockStream, sparsity: float) -> dict[int, Width]:
    return {index: uniform_width(block, sparsity) for index, block in enumerate(stream.blocks)}


def flap_widths(stream: BlockStream, rows: Rows, sparsity: float) -> dict[int, Width]:
    """Return the widths of FLAP's AL-AM: one threshold for all units, on scores standardised within each module.

    Units with the highest scores are kept until their parameters come nearest to the number that shall be left. A head
    counts as many channels as it has parameters (512/3 channels in LLaMA-7B). In grouped-query attention whole KV
    groups are ranked.
    """
    owners: list[tuple[int, str]] = []
    scores: list[Tensor] = []
    sizes: list[Tensor] = []
    for index, stats in dense_statistics(stream, rows):
        block, module = stream.blocks[index], stats.module
        if module.locked:
            continue
        metric, axis = flap.fluctuations(stats), module.cut_axes[0].name
        units = module.axis(axis).units
        one_less = _narrowed(block.width, axis, units - 1)
        owners.append((index, axis))
        scores.append(((metric - metric.mean()) / metric.std()).view(units, -1).mean(1))
        sizes.append(torch.full((units,), block.parameters - block.parameters_at(one_less)))
    order = torch.cat(scores).argsort(descending=True, stable=True)
    size = torch.cat(sizes)
    removed = int(size.sum()) - size[order].cumsum(0)
    wanted = sparsity * _parameters(stream)
    stays = torch.zeros(len(size), dtype=torch.bool)
    stays[order[: int((removed - wanted).abs().argmin()) + 1]] = True
    widths = {index: block.width for index, block in enumerate(stream.blocks)}
    for (index, axis), part in zip(owners, stays.split([len(s) for s in sizes]), strict=True):
        widths[index] = _narrowed(widths[index], axis, int(part.sum()))
    return widths


def _narrowed(width: Width, axis: str, count: int) -> Width:
    """Return a width with `count` units along an axis."""
    if axis == "channels":
        return width | {CHANNELS: count}
    if count == 0:
        return width | {KV_GROUPS: 0, HEADS_PER_GROUP: 0}
    return (width | {KV_GROUPS: count}) if axis == KV_GROUPS else (width | {HEADS_PER_GROUP: count})


# Streams and networks.


def dense_statistics(stream: BlockStream, rows: Rows) -> Iterator[tuple[int, Statistics]]:
    """Yield the statistics of every module, block by block, from one pass of the dense model."""
    with Arena() as arena:
        hidden = stream.embed(rows, arena)
        for index in range(len(stream)):
            with stream.filled(index) as layer:
                yield from ((index, _statistics(stream, index, layer, kind, rows, hidden)) for kind in SCORED_KINDS)
                _advance(stream, index, layer, rows, hidden)


def _statistics(
    stream: BlockStream, index: int, layer: nn.Module, kind: str, rows: Rows, hidden: Activations
) -> Statistics:
    """Return the statistics of one module on the current stream; the target is the module's own output."""
    module = stream.blocks[index].module(kind)
    entries = module.units * module.size
    moments = Moments(entries, device=stream.device)
    for at in rows.batches():

        def see(x: Tensor, _: Tensor, weight: float = at.weight) -> None:
            moments.update(x.reshape(-1, entries), weight=weight)

        stream.run(index, layer, hidden[at], at.group, watch={module.output_layer: see}, until=module.output_layer)
    tensors = dict(layer.named_parameters())
    weight = output_weight(module, tensors)
    return Statistics(module, tensors, weight, moments, None, OBC_RIDGE, target_is_old_output=True, seed=0)


def _through_refit(stream: BlockStream, rows: Rows, widths: dict[int, Width], method: Method) -> Peer:
    """Prune with a criterion and a recovery of secateur."""
    network = _load(stream)
    removed = 1 - sum(b.parameters_at(widths[i]) for i, b in enumerate(stream.blocks)) / _parameters(stream)
    plan = Plan(widths, removed, removed)
    for fitted in refit(stream, plan, rows, method=method, dtype=torch.float32):
        _cut(stream, network, fitted.index, fitted.keep, fitted.changed, widths[fitted.index])
    return _peer(stream, network, _spelled(widths))


def _cheapest(stats: Statistics, width: Width) -> tuple[int, ...]:
    """Return the units of a module that the criterion `surgeon` keeps at a width."""
    module = stats.module
    axis = next((axis.name for axis in module.axes if width[axis.name] < axis.units), module.cut_axes[0].name)
    return remaining_units(module, axis, removal_order(all_criteria()["surgeon"], stats, axis, width[axis]))


def block_influence(stream: BlockStream, rows: Rows) -> Tensor:
    """Return 1 - cos(residual stream before, after) of every block, as the mean over tokens (shape: blocks)."""
    similarity = torch.zeros(len(stream), dtype=torch.float64)
    with Arena() as arena:
        hidden = stream.embed(rows, arena)
        for index in range(len(stream)):
            before = [hidden[at].clone() for at in rows.batches()]
            with stream.filled(index) as layer:
                _advance(stream, index, layer, rows, hidden)
            for at, old in zip(rows.batches(), before, strict=True):
                similarity[index] += at.weight * torch.cosine_similarity(old, hidden[at], dim=-1).double().sum()
    count = sum(at.weight * rows.ids(at).numel() for at in rows.batches())
    return 1 - similarity / count


def _blocks_to_remove(stream: BlockStream, sparsity: float) -> int:
    """Return the number of whole blocks nearest to the sparsity; the smaller one of two that are equally near."""
    return min(range(len(stream)), key=lambda count: (abs(count - sparsity * len(stream)), count))


def _advance(stream: BlockStream, index: int, layer: nn.Module, rows: Rows, hidden: Activations) -> None:
    """Run a block with its current weights, in place."""
    for at in rows.batches():
        hidden[at] = stream.run_through(index, layer, hidden[at], at.group)


def _load(stream: BlockStream) -> Any:
    """Load the dense network in float32."""
    return load(stream.checkpoint, torch.float32, torch.device("cpu"))


def _cut(
    stream: BlockStream, network: Any, index: int, keep: KeptUnits, changed: Mapping[str, BlockTensor], width: Width
) -> None:
    """Remove units from one block of the network."""
    layer, block = layers_of(stream, network)[index], stream.blocks[index]
    tensors = dict(layer.named_parameters()) | {name: whole(tensor).float() for name, tensor in changed.items()}
    narrow(layer, block, {name: whole(tensor) for name, tensor in slice_block(block, tensors, keep).items()}, width)


def _leave(stream: BlockStream, network: Any, layers: list[nn.Module], kept: list[int]) -> None:
    """Keep only some blocks of a network."""
    parent, _, child = stream.family.blocks.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.ModuleList(layers[index] for index in kept))
    network.config.num_hidden_layers = len(kept)
    types = getattr(stream.checkpoint.config, "layer_types", None)
    if types:
        network.config.layer_types = [types[index] for index in kept]
    module: Any
    for position, index in enumerate(kept):
        for module in layers[index].modules():
            # Index of a layer's keys and values in the cache.
            if hasattr(module, "layer_idx"):
                module.layer_idx = position


def layers_of(stream: BlockStream, network: Any) -> nn.ModuleList:
    """Return the blocks of a network."""
    return network.get_submodule(stream.family.blocks)


def count_parameters(stream: BlockStream, network: Any) -> int:
    """Return the number of parameters of a network's blocks."""
    return sum(parameter.numel() for parameter in layers_of(stream, network).parameters())


def _parameters(stream: BlockStream) -> int:
    return sum(block.parameters for block in stream.blocks)


def _peer(stream: BlockStream, network: Any, note: str) -> Peer:
    return Peer(network.eval(), count_parameters(stream, network), note)


def _spelled(widths: Mapping[int, Width]) -> str:
    """Format widths: the range of heads and of channels."""
    found = list(widths.values())
    spans = []
    for what in ("heads", "channels"):
        counts = [getattr(width, what) for width in found]
        low, high = min(counts), max(counts)
        spans.append(f"{low:,} {what}" if low == high else f"{low:,} to {high:,} {what}")
    return ", ".join(spans) + " a block"
