"""llama.cpp's architectures that secateur writes, one entry each, and the choice of one for a model.

Each architecture has its own rules for sizes, biases and norms. `deci`, `openelm` and `gemma4` read heads and channels
from lists, one number per block, so they hold models whose blocks differ in width. The entries are valid from release
b8840 of llama.cpp on; earlier releases refuse query layers with a bias that are narrower than the residual stream. A
family's entry names its architectures; a model gets the first of them that computes it.
"""

from collections.abc import Sequence
from dataclasses import replace

from secateur.base.errors import SecateurError
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.gguf.architecture import (
    SCALINGS,
    Architecture,
    experts_in_every_block,
    gemma2_windows,
    gemma4_settings,
    gemma4_sizes,
    gemma_ratio,
    gpt2_ratio,
    latent_sizes,
    linear_attention,
    listed_windows,
    mpt_slopes,
    regular_windows,
    xielu_parameters,
)
from secateur.gguf.model import QKV, GgufModel, filled
from secateur.gguf.requirements import unmet
from secateur.model.axes import Width, alike
from secateur.model.units.channels import CHANNELS

OUTPUT_LAYERS = frozenset({"attn_output", "ffn_down"})
"""Output projections, by llama.cpp's names; a recovery may add biases to them."""
_NONE = frozenset[str]()
_QKV = frozenset(QKV)
_UNGATED = _QKV | OUTPUT_LAYERS | {"ffn_up"}
_FUSED_QKV: dict[str, tuple[str, ...]] = {"attn_qkv": QKV}
_FUSED_GATE: dict[str, tuple[str, ...]] = {"ffn_up": ("ffn_gate", "ffn_up")}

_LLAMA = Architecture(
    "llama", _UNGATED | {"ffn_gate"}, interleaved_rope=True, scalings=SCALINGS | {"llama3", "longrope"}
)
_GEMMA3 = Architecture(
    "gemma3", _QKV, windows=regular_windows, scalings=SCALINGS - {"yarn"}, activation="gelu", score_ratio=gemma_ratio
)
_QWEN3 = Architecture("qwen3", _QKV)
_UNBIASED = replace(_QWEN3, biases=_NONE)
_OLMO2 = Architecture("olmo2", _NONE, square=True, windows=regular_windows, output="stored")
_GLM = replace(_QWEN3, name="glm4moe", partial=True, leading_dense=True)
_DEEPSEEK2 = replace(_UNBIASED, name="deepseek2", leading_dense=True, attention=latent_sizes)
_LFM2 = replace(_UNBIASED, name="lfm2", square=True)
_NEXT = replace(_UNBIASED, name="qwen3next", partial=True, linear="grouped", metadata=linear_attention)
_QWEN35 = replace(_NEXT, name="qwen35", linear="tiled", sections="interleaved")
_STARCODER2 = Architecture(
    "starcoder2", _UNGATED, needs_biases=True, square=True, activation="gelu", epsilon="layer_norm_epsilon"
)
_GPT2 = replace(_STARCODER2, name="gpt2", fused=_FUSED_QKV)
_COHERE = Architecture(
    "command-r", _NONE, square=True, interleaved_rope=True, output="tied", epsilon="layer_norm_epsilon"
)
_NEMOTRON = replace(_STARCODER2, name="nemotron", needs_biases=False, partial=True, output="stored", activation="relu2")

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        _LLAMA,
        replace(_LLAMA, name="deci", per_layer=True, headless=True),
        replace(_LLAMA, name="arcee", activation="relu2", biases=_NONE),
        replace(_LLAMA, name="granite"),
        Architecture("gemma", _NONE, activation="gelu", output="tied"),
        _STARCODER2,
        Architecture("qwen2", _QKV, square=True),
        Architecture("qwen2vl", _QKV, square=True, sections="consecutive"),
        _QWEN3,
        replace(_QWEN3, name="qwen3vl", sections="interleaved"),
        replace(_QWEN3, name="qwen3vlmoe", sections="interleaved"),
        Architecture("qwen2moe", _QKV, square=True),
        replace(_QWEN3, name="qwen3moe"),
        replace(_OLMO2, name="olmoe", ungrouped=True),
        replace(_LLAMA, name="granitemoe"),
        _GLM,
        replace(_LLAMA, name="smollm3", biases=_NONE),
        Architecture("glm4", _QKV, interleaved_rope=True, fused=_FUSED_GATE, partial=True),
        replace(_UNBIASED, name="exaone4", square=True, windows=regular_windows),
        replace(_UNBIASED, name="hunyuan-dense"),
        replace(_UNBIASED, name="hunyuan-moe"),
        replace(_LLAMA, name="ernie4_5-moe", biases=_NONE, leading_dense=True, metadata=experts_in_every_block),
        Architecture(
            "gpt-oss", _QKV | {"attn_output"}, windows=regular_windows, scalings=frozenset({"default", "yarn"})
        ),
        replace(_GLM, name="dots1", partial=False, ungrouped=True),
        _DEEPSEEK2,
        replace(_DEEPSEEK2, name="mistral4", partial=True),
        replace(_LLAMA, name="llama4", biases=_NONE, windows=regular_windows, metadata=experts_in_every_block),
        Architecture("openelm", _NONE, per_layer=True, fused=_FUSED_QKV, output="tied"),
        Architecture(
            "phi3",
            _QKV,
            square=True,
            fused=_FUSED_QKV | _FUSED_GATE,
            partial=True,
            scalings=SCALINGS | {"longrope"},
        ),
        _OLMO2,
        replace(_GEMMA3, name="gemma2", output="tied", windows=gemma2_windows, caps_scores=True),
        _GEMMA3,
        Architecture(
            "gemma4",
            _NONE,
            per_layer=True,
            scalings=frozenset({"proportional"}),
            windows=listed_windows,
            activation="gelu",
            attention=gemma4_sizes,
            metadata=gemma4_settings,
        ),
        replace(_GPT2, score_ratio=gpt2_ratio),
        replace(_GPT2, name="gptneox", partial=True, output="stored"),
        replace(_STARCODER2, name="phi2", partial=True, output="stored"),
        replace(_LLAMA, name="mistral3"),
        Architecture("chatglm", _QKV, square=True, interleaved_rope=True, fused=_FUSED_GATE, partial=True),
        replace(_GPT2, name="falcon", biases=_NONE, needs_biases=False),
        replace(_GPT2, name="bloom"),
        replace(_GPT2, name="mpt", biases=_NONE, needs_biases=False, clamps=True, metadata=mpt_slopes),
        replace(_GLM, name="minimax-m2", biases=_NONE, output="stored", leading_dense=False),
        _COHERE,
        replace(_COHERE, name="cohere2", windows=regular_windows),
        _NEMOTRON,
        replace(_NEMOTRON, name="jais2", partial=False, needs_biases=True, ungrouped=True),
        replace(_NEMOTRON, name="stablelm", biases=_QKV, activation="silu"),
        replace(_COHERE, name="olmo", output="either", clamps=True),
        replace(
            _UNBIASED,
            name="apertus",
            scalings=SCALINGS | {"llama3"},
            output="stored",
            activation="xielu",
            metadata=xielu_parameters,
        ),
        _LFM2,
        replace(_LFM2, name="lfm2moe", leading_dense=True, states_routing=True, output="tied"),
        _NEXT,
        _QWEN35,
        replace(_QWEN35, name="qwen35moe"),
        replace(_GLM, name="exaone-moe", partial=False, windows=regular_windows, biases=_NONE, output="stored"),
    )
}
"""Entries by llama.cpp's names."""


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
    block = model.storage.block
    widths = (
        width | {CHANNELS: filled(width[CHANNELS], block)} if CHANNELS in width else width for width in model.widths
    )
    if not architecture.per_layer and not alike(widths):
        return "has one width for all blocks, so prune all of them with uniform widths"
    return ", and ".join(unmet(model, architecture)) or None


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
