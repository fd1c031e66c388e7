"""Which pruned models vLLM computes. It loads nothing of vLLM: what is known was seen in version 0.32, on one CPU.

A folder of the stock format runs in vLLM's class for the family, and one with widths block by block, given
`--trust-remote-code`, in vLLM's transformers backend: it builds the folder's own class and gives each layer an
attention of that layer's head counts.
"""

from collections.abc import Sequence
from typing import Any

from secateur.families.registry import family_of
from secateur.model.axes import Width
from secateur.model.facts import head_dim


def vllm_unsupported(config: Any, widths: Sequence[Width], *, per_layer: bool, multimodal: bool = False) -> str | None:
    """Why vLLM does not compute a model, as a clause that ends in what can be done instead; or None when it does.

    On CPUs vLLM also wants head sizes of 32, 64, 80 and some larger ones; the dense model meets the same.

    Args:
        config: the config object of the dense model, or of the folder.
        widths: of every block.
        per_layer: the folder gives each block its width (`--format hf`), else it is of the stock format.
        multimodal: the model is one inside a multimodal checkpoint.
    """
    kind, family = config.model_type, family_of(config)
    if not per_layer:
        # Where another kind of layer stands in its place, heads are a number alone.
        return _stock_unsupported(config, min(widths, key=lambda width: width.heads))
    if multimodal:
        return "its multimodal models have one width for all blocks; take --widths uniform"
    if family.vllm.backend is not None:
        return family.vllm.backend
    if family.latent is not None:
        return "its transformers backend runs no latent attention block by block; take --widths uniform"
    mixture = family.experts
    if mixture is not None and mixture.scales_inputs:
        return f"its transformers backend cannot load the experts of {kind}; take --widths uniform"
    if mixture is not None and any(w.experts and w.channels != getattr(config, mixture.expert_width) for w in widths):
        return (
            "its transformers backend gives experts of all blocks as many channels; take --widths uniform, or leave "
            "theirs by --modules heads,experts"
        )
    if mixture is not None and mixture.parallel_norms and any(width.experts for width in widths):
        return "its transformers backend gives other numbers for experts beside a feed-forward; take --widths uniform"
    if not any(width.heads for width in widths):
        return "its attention divides by the largest head count of all blocks; keep a head in one of them"
    return None


def _stock_unsupported(config: Any, width: Width) -> str | None:
    """Return why vLLM's own class for the family, which may read less than transformers' does, cannot run a model."""
    limits = family_of(config).vllm
    if limits.derives_head_size is not None and config.hidden_size // width.heads != head_dim(config):
        return (
            f"its class for {config.model_type} derives the head size from hidden_size / heads, which {width.heads} "
            f"heads of {head_dim(config)} do not give; {limits.derives_head_size}"
        )
    return None if limits.stock is None else limits.stock(config)
