"""What one of llama.cpp's graphs computes, as an entry of a table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gguf import GGUFWriter

from secateur.formats.gguf_model import GgufModel

Requirement = Callable[[GgufModel, "Architecture"], str | None]
"""What a graph asks of a model: the rest of a sentence that begins with its name, or None where the model meets it."""
Setting = Callable[[GGUFWriter, GgufModel], None]
"""Adds what only files of one graph say."""

SCALINGS = frozenset({"default", "dynamic", "linear", "yarn"})
"""Kinds of rotary scaling that most graphs compute."""


@dataclass(frozen=True)
class Architecture:
    """What one of llama.cpp's graphs computes and where it looks for it, as far as ours differ in that."""

    name: str
    biases: frozenset[str]
    """Layers whose bias is added where there is one."""
    needs_biases: bool = False
    """All of these biases must be there."""
    per_layer: bool = False
    """Heads and channels are read block by block."""
    headless: bool = False
    """Blocks without heads are skipped over; elsewhere they keep one head that adds nothing."""
    square: bool = False
    """Query rows are as many as the residual stream is wide."""
    ungrouped: bool = False
    """Every query head has a key/value head of its own."""
    pairs: bool = False
    """Consecutive entries of a head rotate together, not entries half a head apart."""
    head_norms: bool = False
    """Queries and keys of every head are normed."""
    fused_qkv: bool = False
    fused_gate: bool = False
    """One tensor for the gate's rows, then the up layer's."""
    scalings: frozenset[str] = SCALINGS
    """Kinds of rotary scaling."""
    partial: bool = False
    """A part of a head may stay unrotated."""
    windows: bool = False
    """Layers may have sliding windows; elsewhere every layer sees everything."""
    output: Literal["either", "tied", "stored"] = "either"
    """The output matrix: the embedding where none is stored, always the embedding, or always stored."""
    activation: Literal["silu", "gelu", "relu2", "xielu"] = "silu"
    epsilon: Literal["rms", "layer"] = "rms"
    final_norm: str | None = "output_norm.weight"
    """None where no norm has factors."""
    distances: bool = False
    """Attention fades with the distance (ALiBi), and nothing rotates."""
    scales: bool = False
    """Embeddings, attention scores, module outputs and logits are each multiplied by a number of the file."""
    normed: bool | None = None
    """The gates of what a token meets add up to one: always, never, or as the file says."""
    leading: bool = False
    """The first blocks may have channels in place of experts."""
    linear: Literal["grouped", "tiled"] | None = None
    """Linear attention stands in the attention's place but in every so-manieth block; its value heads lie group by
    group, or the first of all groups before the second ones."""
    sections: Literal["apart", "in turn"] | None = None
    """Time, height and width of a picture turn frequencies of their own: one after the other, or each every third."""
    latent: bool = False
    """All heads share one key and one value, a latent vector, and what each makes of it is put off."""
    requirements: tuple[Requirement, ...] = ()
    """What its code fixes, beyond the fields above."""
    settings: tuple[Setting, ...] = ()
    """What its files say, beyond what all files do."""
    score_ratio: Callable[[GgufModel, int], float] | None = None
    """The model's scale of a block's attention scores over the graph's; None where they are equal."""
    rounds_yarn: bool = True
    """The limits of yarn are rounded."""
    windows_by_block: bool = False
    """The file names the blocks with windows; elsewhere they lie at regular intervals."""
    always_windows: bool = False
    """Files say how wide windows are, also where no layer has one."""
    caps_logits: bool = False
    """Attention logits are capped."""
    routing: bool = False
    """Files say how gates are made, also where they are `normed` always or never."""
