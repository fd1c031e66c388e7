"""Proof on a tiny model that units can be cut out: the block gives what it gives with these units set to zero."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from secateur.layout.probe import BlockProbe, first
from secateur.model.structure import Block, KeptUnits, PrunableModule
from secateur.model.surgery import kept_inputs, narrow, slice_block, width_of

INEXACT = "removing some of them changes what the others compute"


def disproved(probe: BlockProbe, block: Block) -> dict[str, str]:
    """Return the kinds of units of a block that cannot be cut out one by one, each with the reason.

    Args:
        probe: The recorded block.
        block: Its description.
    """
    found = {}
    for module in block.modules:
        is_free = module.axes[0].removable and not module.locked and module.units > 1
        if is_free and not _is_exact(probe, block, module):
            found[module.kind] = INEXACT
    return found


def _is_exact(probe: BlockProbe, block: Block, module: PrunableModule) -> bool:
    """Return whether a block without the first units of a module gives the same as with these units set to zero."""
    kept: dict[str, tuple[int, ...]] = {other.kind: tuple(range(other.units)) for other in block.modules}
    # A whole KV group, or one expert of each group, so that later units move up.
    first_left = module.per_group if module.groups > 1 else 1
    kept[module.kind] = (
        tuple(range(first_left, module.units))
        if module.kind == "heads"
        else tuple(unit for unit in range(module.units) if unit % module.per_group)
    )
    try:
        small = _cut(probe, block, kept)
        if module.kind == "experts":
            return _experts_agree(probe, module, small, kept)
        return _agree(*_outputs(probe, module, small, kept))
    except Exception:
        # Whatever a class raises, its block does not run without these units.
        return False


def _cut(probe: BlockProbe, block: Block, kept: KeptUnits) -> nn.Module:
    """Return a copy of the block with the kept units alone."""
    small = copy.deepcopy(probe.block)
    tensors: Any = slice_block(block, small.state_dict(), kept)
    narrow(small, block, tensors, width_of(block, kept))
    return small


def _outputs(probe: BlockProbe, module: PrunableModule, small: nn.Module, kept: KeptUnits) -> tuple[Any, Any]:
    """Return the outputs of the narrow block, and of the block with zeros for the other units."""
    mask = torch.zeros(module.units * module.size, dtype=torch.float64)
    mask[kept_inputs(module, kept[module.kind])] = 1
    layer = probe.block.get_submodule(module.output_layer)
    hook = layer.register_forward_pre_hook(lambda _, args: (args[0] * mask, *args[1:]))
    try:
        masked = probe.run()
    finally:
        hook.remove()
    return probe.run_as(small), masked


def _experts_agree(probe: BlockProbe, module: PrunableModule, small: nn.Module, kept: KeptUnits) -> bool:
    """Return whether the experts of the narrow block give what the same experts gave in the whole one."""
    path = module.output_projection.name.rpartition(".")[0]
    calls: list[tuple[tuple[Any, ...], Any]] = []
    hook = small.get_submodule(path).register_forward_hook(lambda _, args, output: calls.append((args, output)))
    probe.run_as(small)
    hook.remove()
    (x, places, gates), output = calls[0]
    numbers = torch.tensor(kept[module.kind])[places]
    wanted: Tensor = first(probe.block.get_submodule(path)(x, numbers, gates))
    return _agree(first(output), wanted)


def _agree(one: Tensor, other: Tensor) -> bool:
    """Return whether outputs differ by rounding at most; some classes compute parts in float32."""
    return bool((one - other).abs().max() <= 1e-6 * other.abs().max())
