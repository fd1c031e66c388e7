"""What only files of one graph of llama.cpp say, and where its scale of attention scores is fixed."""

from gguf import GGUFWriter

from secateur.formats.gguf_model import GgufModel


def logit_scale(writer: GGUFWriter, model: GgufModel) -> None:
    """Add the factor of the logits (Command R)."""
    writer.add_logit_scale(model.config.logit_scale)


def experts_in_every_block(writer: GGUFWriter, model: GgufModel) -> None:
    """Add the interval between blocks with experts (ERNIE, Llama 4)."""
    if any(width.experts for width in model.widths):
        writer.add_interleave_moe_layer_step(1)


def xielu_parameters(writer: GGUFWriter, model: GgufModel) -> None:
    """Add the parameters of every block's activation (Apertus)."""
    for key in ("alpha_n", "alpha_p", "beta", "eps"):
        stored = [inside[f"mlp.act_fn.{key}"] for inside in model.inside]
        getattr(writer, f"add_xielu_{key}")([float(model.checkpoint.read(name)) for name in stored])


def steepest_slope(writer: GGUFWriter, model: GgufModel) -> None:
    """Add the largest slope by which attention fades with the distance (MPT)."""
    writer.add_max_alibi_bias(8.0)


def parallel_residual(writer: GGUFWriter, model: GgufModel) -> None:
    """Add whether both modules read the same stream (GPT-NeoX)."""
    writer.add_parallel_residual(model.config.use_parallel_residual)


def attention_cap(writer: GGUFWriter, model: GgufModel) -> None:
    """Add the cap of attention logits (Gemma 2)."""
    writer.add_attn_logit_softcapping(model.config.attn_logit_softcapping)


def gemma_ratio(model: GgufModel, index: int, *, deepest: int) -> float:
    """Return the model's scale of attention scores over llama.cpp's.

    It tells the family's 27B model by its depth, and takes that one's scale from the width per head.
    """
    config = model.config
    assumed = config.hidden_size // model.widths[0].heads if len(model.widths) == deepest else model.dim
    return float((assumed / config.query_pre_attn_scalar) ** 0.5)


def gpt2_ratio(model: GgufModel, index: int) -> float:
    """Return the model's scale of attention scores over llama.cpp's, in a block."""
    config = model.config
    ratio = 1.0 if config.scale_attn_weights else float(model.dim**0.5)
    return ratio / (index + 1) if config.scale_attn_by_inverse_layer_idx else ratio
