"""Description of a block by its modules; each file of `secateur.model.units` describes one kind of module.

Sizes, biases and the orientation of matrices are read from the block itself, on the meta device.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from secateur.base.errors import SecateurError
from secateur.base.words import first_duplicate
from secateur.families.family import NOWHERE, submodule
from secateur.families.registry import family_of
from secateur.model.axes import ATTENTION, FEED_FORWARD, ROLES
from secateur.model.structure import Block, PrunableModule, described


def describe_all(config: Any, layers: Iterable[nn.Module]) -> list[Block]:
    """Describe the blocks of a model; raise `AttributeError` if no block has a module that the family's entry names."""
    layers, family = [*layers], family_of(config)
    blocks = [describe(config, layer) for layer in layers]
    roles = [{module.role for module in block.modules} for block in blocks]
    places = (ATTENTION, family.attention, family.output), (FEED_FORWARD, family.feed_forward, family.down)
    for role, path, output in places if layers else ():
        if path == NOWHERE:
            continue
        # Token mixers may stand in the attention's place in every block.
        lost = not all(role in own for own in roles) and all(submodule(layer, path) is None for layer in layers)
        if lost or not any(role in own for own in roles):
            layers[0].get_submodule(".".join(filter(None, (path, output))))
    return blocks


def describe(config: Any, layer: nn.Module) -> Block:
    """Describe a block.

    Args:
        config: The model's config.
        layer: One of its blocks, on any device; only names, types and shapes are read.

    Raises:
        SecateurError: The family's entry names a tensor that is not there, or one tensor for two layers.
    """
    family = family_of(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    modules = tuple(filter(None, (described(role, config, family, layer) for role in ROLES)))
    names = [name for module in modules for name in _names(module)]
    if wrong := next((name for name in names if name not in shapes), None) or first_duplicate(names):
        what = "stands for two layers" if wrong in shapes else "is no tensor of a block"
        raise SecateurError(f"{config.model_type}: its entry names {wrong}, which {what}; correct the entry")
    buffers = shapes.keys() & {name for name, _ in layer.named_buffers()}
    return Block(modules, shapes, frozenset(buffers))


def _names(module: PrunableModule) -> list[str]:
    """Return the names of a module's tensors; a name is listed twice if the family's entry gives it to two layers.

    Fused layers are several slabs of one tensor, and the matrices of experts become narrower along two axes.
    """
    inputs, output = dict.fromkeys(slab.name for slab in module.input_projections), module.output_projection.name
    doubled = [slab.name for slab in module.input_projections if module.input_projections.count(slab) > 1]
    if module.units_inside:
        # Channels of experts are inputs of the output projection, and listed among the input projections.
        inputs.pop(output, None)
    return [*inputs, output, *doubled]
