"""The choice of an architecture of llama.cpp for a model: the first of its family's list that computes the model."""

from collections.abc import Sequence

from secateur.base.errors import SecateurError
from secateur.formats.gguf_architecture import Architecture
from secateur.formats.gguf_architectures import ARCHITECTURES, OUTPUT_LAYERS
from secateur.formats.gguf_model import GgufModel
from secateur.formats.gguf_requirements import COMMON
from secateur.model.axes import Width, alike
from secateur.model.checkpoint import Checkpoint


def choose_architecture(model: GgufModel) -> Architecture:
    """Return the first architecture that computes a model.

    Raises:
        SecateurError: No architecture computes the model; the message gives a reason for each one of the family.
    """
    reasons = []
    # If a block has no heads, an architecture that can leave out its attention is better than one with an idle head.
    headless = any(not sizes.heads for sizes in model.blocks)
    for name in sorted(model.source.architectures, key=lambda name: headless and not ARCHITECTURES[name].headless):
        reason = _unsupported_reason(model, ARCHITECTURES[name])
        if reason is None:
            return ARCHITECTURES[name]
        reasons.append(f"{name} {reason}")
    raise SecateurError(
        f"{model.checkpoint.source}: no architecture of llama.cpp holds this model: {'; '.join(reasons)}"
    )


def _unsupported_reason(model: GgufModel, architecture: Architecture) -> str | None:
    """Return why an architecture does not compute a model, as the rest of a sentence that begins with its name."""
    if not architecture.per_layer and not alike(sizes.filled(model.storage.block).numbers() for sizes in model.blocks):
        return "has one width for all blocks, so prune all of them with uniform widths"
    reasons = (requirement(model, architecture) for requirement in (*COMMON, *architecture.requirements))
    return ", and ".join(filter(None, reasons)) or None


def gguf_unsupported(
    checkpoint: Checkpoint, widths: Sequence[Width], type: str = "f16", *, biases: bool = False
) -> str | None:
    """Return why no GGUF file can hold a model, pruned or to be pruned; None if one can. No weights are read.

    Args:
        checkpoint: The stored model.
        widths: Width of each block.
        type: Name of the file's type.
        biases: The recovery adds biases to output projections.
    """
    try:
        choose_architecture(GgufModel(checkpoint, widths, OUTPUT_LAYERS if biases else frozenset(), type))
    except SecateurError as error:
        return str(error).removeprefix(f"{checkpoint.source}: ")
    return None
