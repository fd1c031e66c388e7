"""What llama.cpp's graphs compute, as tables.

llama.cpp has one graph an architecture, which looks for widths, biases and norms in its own places. Two of them read
heads and channels from arrays, one number a block: they carry models whose blocks differ in width. The tables hold from
release b8840 of llama.cpp; releases before it refuse biased query layers that are not as wide as the residual stream.
A family's entry names its graphs; which of them a model takes is decided in `gguf_choice.py`.
"""

from dataclasses import dataclass, replace
from typing import Literal

import gguf
from gguf import GGMLQuantizationType


@dataclass(frozen=True)
class Storage:
    """How a type of file stores weights."""

    matrices: GGMLQuantizationType
    ends: GGMLQuantizationType
    """Of the embedding and the output matrix, which suffer most."""
    file: int
    """llama.cpp's number of it."""

    @property
    def multiple(self) -> int:
        """What a row must be a multiple of."""
        return int(gguf.GGML_QUANT_SIZES[self.matrices][0])

    @property
    def bytes(self) -> float:
        """What a weight takes in a matrix."""
        entries, size = gguf.GGML_QUANT_SIZES[self.matrices]
        return float(size / entries)


_T, _F = GGMLQuantizationType, gguf.LlamaFileType

TYPES: dict[str, Storage] = {
    "f32": Storage(_T.F32, _T.F32, _F.ALL_F32),
    "f16": Storage(_T.F16, _T.F16, _F.MOSTLY_F16),
    "bf16": Storage(_T.BF16, _T.BF16, _F.MOSTLY_BF16),
    "q8_0": Storage(_T.Q8_0, _T.Q8_0, _F.MOSTLY_Q8_0),
    "q4_0": Storage(_T.Q4_0, _T.Q8_0, _F.MOSTLY_Q4_0),
}
"""By the name that a person gives."""

_SCALINGS = frozenset({"default", "dynamic", "linear", "yarn"})
QKV = frozenset({"attn_q", "attn_k", "attn_v"})
_ALL = QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}


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
    scalings: frozenset[str] = _SCALINGS
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


_LLAMA = Architecture("llama", _ALL, pairs=True, scalings=_SCALINGS | {"llama3", "longrope"}, normed=True)
_GEMMA3 = Architecture("gemma3", QKV, head_norms=True, windows=True, scalings=_SCALINGS - {"yarn"}, activation="gelu")
_PHI3 = Architecture("phi3", QKV, square=True, fused_qkv=True, partial=True, scalings=_SCALINGS | {"longrope"})
_QWEN3 = Architecture("qwen3", QKV, head_norms=True)
_OLMO2 = Architecture("olmo2", frozenset(), square=True, windows=True, output="stored")
_GLM = replace(_QWEN3, name="glm4moe", partial=True, leading=True)
_DEEPSEEK2 = replace(_GLM, name="deepseek2", partial=False, head_norms=False, latent=True, biases=frozenset())
_LFM2 = replace(_QWEN3, name="lfm2", square=True, biases=frozenset(), final_norm="token_embd_norm.weight")
_NEXT = replace(_QWEN3, name="qwen3next", biases=frozenset(), partial=True, normed=True, linear="grouped")
_QWEN35 = replace(_NEXT, name="qwen35", linear="tiled", sections="in turn")
_GPT = Architecture("gpt2", _ALL - {"ffn_gate"}, square=True, fused_qkv=True, activation="gelu", epsilon="layer")
_COHERE = Architecture("command-r", frozenset(), square=True, pairs=True, output="tied", epsilon="layer")
_NEMOTRON = Architecture(
    "nemotron", _ALL - {"ffn_gate"}, square=True, partial=True, output="stored", activation="relu2", epsilon="layer"
)

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        _LLAMA,
        replace(_LLAMA, name="deci", per_layer=True, headless=True),
        replace(_LLAMA, name="arcee", activation="relu2", biases=frozenset()),
        replace(_LLAMA, name="granite", scales=True),
        Architecture("gemma", frozenset(), activation="gelu", output="tied"),
        Architecture("starcoder2", _ALL - {"ffn_gate"}, square=True, activation="gelu", epsilon="layer"),
        Architecture("qwen2", QKV, square=True),
        Architecture("qwen2vl", QKV, square=True, sections="apart"),
        _QWEN3,
        replace(_QWEN3, name="qwen3vl", sections="in turn"),
        replace(_QWEN3, name="qwen3vlmoe", sections="in turn", normed=True),
        Architecture("qwen2moe", QKV, square=True, normed=False),
        replace(_QWEN3, name="qwen3moe", normed=True),
        replace(_OLMO2, name="olmoe", ungrouped=True, normed=False),
        replace(_LLAMA, name="granitemoe", scales=True),
        _GLM,
        replace(_LLAMA, name="smollm3", biases=frozenset()),
        Architecture("glm4", QKV, pairs=True, fused_gate=True, partial=True),
        Architecture("exaone4", frozenset(), square=True, head_norms=True, windows=True),
        Architecture("hunyuan-dense", frozenset(), head_norms=True),
        Architecture("hunyuan-moe", frozenset(), head_norms=True, normed=True),
        replace(_LLAMA, name="ernie4_5-moe", biases=frozenset(), leading=True, normed=True),
        Architecture(
            "gpt-oss", QKV | {"attn_output"}, windows=True, scalings=frozenset({"default", "yarn"}), normed=True
        ),
        replace(_GLM, name="dots1", partial=False, ungrouped=True),
        _DEEPSEEK2,
        replace(_DEEPSEEK2, name="mistral4", partial=True),
        replace(_LLAMA, name="llama4", biases=frozenset(), normed=False, windows=True),
        Architecture("openelm", frozenset(), per_layer=True, head_norms=True, fused_qkv=True, output="tied"),
        replace(_PHI3, fused_gate=True),
        _OLMO2,
        replace(_GEMMA3, name="gemma2", head_norms=False, output="tied"),
        _GEMMA3,
        replace(
            _GEMMA3,
            name="gemma4",
            biases=frozenset(),
            per_layer=True,
            scalings=frozenset({"proportional"}),
            normed=True,
        ),
        replace(_GPT, needs_biases=True),
        replace(_GPT, name="gptneox", needs_biases=True, partial=True, output="stored"),
        replace(_GPT, name="phi2", fused_qkv=False, needs_biases=True, partial=True, output="stored"),
        replace(_LLAMA, name="mistral3"),
        Architecture("chatglm", QKV, square=True, pairs=True, fused_gate=True, partial=True),
        replace(_GPT, name="falcon", biases=frozenset()),
        replace(_GPT, name="bloom", needs_biases=True, distances=True),
        replace(_GPT, name="mpt", biases=frozenset(), distances=True),
        replace(_GLM, name="minimax-m2", biases=frozenset(), output="stored", leading=False),
        _COHERE,
        replace(_COHERE, name="cohere2", windows=True),
        _NEMOTRON,
        replace(_NEMOTRON, name="jais2", partial=False, needs_biases=True, ungrouped=True),
        replace(_NEMOTRON, name="stablelm", biases=QKV, activation="silu"),
        Architecture("olmo", frozenset(), square=True, pairs=True, final_norm=None, epsilon="layer"),
        replace(
            _QWEN3,
            name="apertus",
            biases=frozenset(),
            scalings=_SCALINGS | {"llama3"},
            output="stored",
            activation="xielu",
        ),
        _LFM2,
        replace(_LFM2, name="lfm2moe", leading=True, normed=True, output="tied"),
        _NEXT,
        _QWEN35,
        replace(_QWEN35, name="qwen35moe"),
        replace(_GLM, name="exaone-moe", partial=False, windows=True, biases=frozenset(), output="stored"),
    )
}
"""By llama.cpp's name."""


ACTIVATIONS = {
    "silu": {"silu", "swish"},
    "relu2": {"relu2"},
    "xielu": {"xielu"},
    "gelu": {"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"},
}
"""llama.cpp's name → transformers'; it has one gelu, and the exact one differs from it by less than 0.001."""

SWIGLU_LIMIT = 7.0
"""Of gpt-oss's activation, in llama.cpp."""

LEVEL2 = frozenset({"attn_output", "ffn_down"})
"""The output layers of both modules, to which a recovery may add biases."""
