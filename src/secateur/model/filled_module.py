"""A module together with the block that holds its weights, as one argument of what reads or measures the module."""

from dataclasses import dataclass

from torch import nn

from secateur.model.stream import BlockStream
from secateur.model.structure import PrunableModule


@dataclass(frozen=True)
class FilledModule:
    """Module of a block whose weights are loaded."""

    stream: BlockStream
    """The model."""
    index: int
    """Index of the block."""
    layer: nn.Module
    """The block, from `BlockStream.filled`."""
    module: PrunableModule
    """Description of the module."""
