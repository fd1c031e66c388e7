"""Which pruned models vLLM computes. It loads nothing of vLLM: what is known was seen in version 0.32, on one CPU.

A folder of the stock format runs in vLLM's class for the family, and one with widths block by block, given
`--trust-remote-code`, in vLLM's transformers backend: it builds the folder's own class and gives each layer an
attention of that layer's head counts.
"""

from collections.abc import Sequence
from typing import Any

from secateur.model.families import FAMILIES, head_dim
from secateur.model.structure import Width

OTHERWISE = "serve it with --model-impl transformers, or write it with --format hf"

DERIVING = {"qwen2": OTHERWISE, "lfm2": "prune channels only", "lfm2_moe": "prune experts and channels only"}
"""Families whose class there derives the head size, and what to do instead of fewer heads."""

BACKEND = {
    "phimoe": "cannot run the attention of phimoe",
    "minimax_m2": "does not know the router of minimax_m2",
}
"""What its transformers backend makes of some mixtures, dense or pruned."""


def vllm_obstacle(config: Any, widths: Sequence[Width], *, per_layer: bool, multimodal: bool = False) -> str | None:
    """Why vLLM does not compute a model, as a clause that ends in what can be done instead; or None when it does.

    On CPUs vLLM also wants head sizes of 32, 64, 80 and some larger ones; the dense model meets the same.

    Args:
        config: the config object of the dense model, or of the folder.
        widths: of every block.
        per_layer: the folder gives each block its width (`--format hf`), else it is of the stock format.
        multimodal: the model is one inside a multimodal checkpoint.
    """
    kind = config.model_type
    if not per_layer:
        # Where another kind of layer stands in its place, heads are a number alone.
        return _stock_obstacle(config, min(widths, key=lambda width: width.heads)) if kind in DERIVING else None
    if multimodal:
        return "its multimodal models have one width for all blocks; take --widths uniform"
    if kind == "gpt2":
        return (
            "its transformers backend cannot run gpt2, dense or pruned: it drops the biases of c_attn, and the class "
            "reshapes what vLLM's attention returns to one row; prune channels only, in the stock format"
        )
    if FAMILIES[kind].latent is not None:
        return "its transformers backend runs no latent attention block by block; take --widths uniform"
    mixture = FAMILIES[kind].experts
    if kind in BACKEND:
        return f"its transformers backend {BACKEND[kind]}; take --widths uniform"
    if mixture is not None and mixture.scales_inputs:
        return f"its transformers backend cannot load the experts of {kind}; take --widths uniform"
    if mixture is not None and any(w.experts and w.channels != getattr(config, mixture.width) for w in widths):
        return (
            "its transformers backend gives experts of all blocks as many channels; take --widths uniform, or leave "
            "theirs by --modules heads,experts"
        )
    if mixture is not None and mixture.apart and any(width.experts for width in widths):
        return "its transformers backend gives other numbers for experts beside a feed-forward; take --widths uniform"
    if not any(width.heads for width in widths):
        return "its attention divides by the largest head count of all blocks; keep a head in one of them"
    return None


def _stock_obstacle(config: Any, width: Width) -> str | None:
    """vLLM's own classes of some families do not read all that transformers' do."""
    kind = config.model_type
    if config.hidden_size // width.heads != head_dim(config):
        return (
            f"its class for {kind} derives the head size from hidden_size / heads, which {width.heads} heads of "
            f"{head_dim(config)} do not give; {DERIVING[kind]}"
        )
    if kind == "qwen2" and len(set(config.layer_types)) > 1 and config.max_window_layers != config.num_hidden_layers:
        return f"its class for qwen2 has a sliding window in all blocks or none; {OTHERWISE}"
    return None
