"""Limits of vLLM on pruned models. vLLM is not imported: the limits were found by trying version 0.32 on one CPU.

vLLM runs a folder of the format `stock` with its own class for the family. A folder with a width for each block needs
`--trust-remote-code`, and runs in vLLM's transformers backend, which builds the folder's own class and gives each layer
an attention with that layer's number of heads.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from secateur.checkpoints.facts import head_dim
from secateur.families.registry import family_of
from secateur.model.axes import Width
from secateur.model.units.experts import EXPERT_CHANNELS, EXPERTS
from secateur.model.units.heads import HEADS, KV_GROUPS


def vllm_unsupported(config: Any, widths: Sequence[Width], *, per_layer: bool, multimodal: bool = False) -> str | None:
    """Return why vLLM cannot run a model, as a clause that ends in what can be done instead; None if it can.

    On CPUs vLLM also needs head sizes of 32, 64, 80 or some larger ones; this limits the dense model too.

    Args:
        config: The config object of the dense model, or of the folder.
        widths: Width of every block.
        per_layer: The folder has a width for each block (`--format hf`); else it is of the format `stock`.
        multimodal: The model is inside a multimodal checkpoint.
    """
    if not per_layer:
        with_heads = [width.product(HEADS) for width in widths if KV_GROUPS in width]
        return _stock_unsupported(config, min(with_heads)) if with_heads else None
    limits = _backend_limits(config, widths, multimodal)
    return next((reason for applies, reason in limits if applies and reason), None)


def _backend_limits(config: Any, widths: Sequence[Width], multimodal: bool) -> Iterator[tuple[Any, str | None]]:
    """Yield limits of vLLM's transformers backend: whether a model is beyond a limit, and why it then cannot run."""
    family, kind = family_of(config), config.model_type
    yield multimodal, "its multimodal models need the same widths in all blocks; use --widths uniform"
    yield True, family.entry.vllm.backend
    yield (
        family.latent,
        "its transformers backend needs the same latent attention in all blocks; use --widths uniform",
    )
    if (experts := family.experts) is not None:
        routed = [width for width in widths if width.get(EXPERTS)]
        yield (
            experts.scales_inputs,
            f"its transformers backend cannot load the experts of {kind}; use --widths uniform",
        )
        yield (
            any(width[EXPERT_CHANNELS] != getattr(config, experts.expert_width) for width in routed),
            "its transformers backend needs the same number of expert channels in all blocks; use --widths uniform, or "
            "keep expert channels with --modules heads,experts",
        )
        yield (
            experts.parallel_norms and routed,
            "its transformers backend gives wrong results for experts parallel to a feed-forward; use --widths uniform",
        )
    yield (
        not any(KV_GROUPS in width and width.product(HEADS) for width in widths),
        "its attention divides by the largest head count of all blocks; keep a head in one of them",
    )


def _stock_unsupported(config: Any, heads: int) -> str | None:
    """Return why vLLM's own class for the family cannot run a model with some number of heads; None if it can.

    That class may read fewer config keys than transformers' class.
    """
    limits, dim = family_of(config).entry.vllm, head_dim(config)
    if limits.instead_of_fewer_heads is not None and config.hidden_size // heads != dim:
        return (
            f"its class for {config.model_type} derives the head size from hidden_size / heads, which {heads} heads of "
            f"{dim} do not give; {limits.instead_of_fewer_heads}"
        )
    return None if limits.stock is None else limits.stock(config)
