"""Which of llama.cpp's architectures computes a model, and what keeps the others from it.

A model takes the first one on its family's list that computes the same.
"""

from collections.abc import Sequence

from secateur.base.errors import SecateurError
from secateur.formats.gguf_architecture import Architecture
from secateur.formats.gguf_architectures import ARCHITECTURES, LEVEL2
from secateur.formats.gguf_model import GgufModel
from secateur.formats.gguf_requirements import COMMON
from secateur.formats.gguf_types import TYPES, check_type
from secateur.model.axes import Width, alike
from secateur.model.checkpoint import Checkpoint
from secateur.model.units.channels import CHANNELS


def filled(channels: int, type: str) -> int:
    """Channels of whole rows. llama.cpp's graphs leave a block without any before its attention has been added."""
    multiple = TYPES[type].multiple
    return max(1, -(-channels // multiple)) * multiple


def in_file(width: Width, type: str) -> Width:
    """A width as a file has it."""
    return width if width.experts else width | {CHANNELS: filled(width.channels, type)}


def choose(model: GgufModel, type: str) -> Architecture:
    """The first architecture that computes the model.

    Raises:
        SecateurError: there is none; with what each one lacks and what would fit.
    """
    check_type(type)
    reasons = []
    # An architecture that leaves heads out comes first where there are none, as others keep an idle one.
    headless = any(not width.heads for width in model.widths)
    for name in sorted(model.source.architectures, key=lambda name: headless and not ARCHITECTURES[name].headless):
        reason = _reason(model, ARCHITECTURES[name], type)
        if reason is None:
            return ARCHITECTURES[name]
        reasons.append(f"{name} {reason}")
    raise SecateurError(
        f"{model.checkpoint.source}: no architecture of llama.cpp holds this model: {'; '.join(reasons)}"
    )


def _reason(model: GgufModel, architecture: Architecture, type: str) -> str | None:
    """Return what an architecture lacks for a model, as the rest of a sentence that begins with its name."""
    if not architecture.per_layer and not alike(in_file(width, type) for width in model.widths):
        return "has one width for all blocks, so prune all of them with uniform widths"
    reasons = (requirement(model, architecture) for requirement in (*COMMON, *architecture.requirements))
    return ", and ".join(filter(None, reasons)) or None


def gguf_unsupported(
    checkpoint: Checkpoint, widths: Sequence[Width], type: str = "f16", *, biases: bool = False
) -> str | None:
    """Why no GGUF file of a type can hold a model, pruned or not, at the widths of its blocks, or None.

    Reads no weights. With `biases`, the output layers of both modules get some.
    """
    try:
        choose(GgufModel(checkpoint, list(widths), LEVEL2 if biases else frozenset()), type)
    except SecateurError as error:
        return str(error).removeprefix(f"{checkpoint.source}: ")
    return None
