"""What llama.cpp's graphs compute, and which of them may compute a family, as tables.

llama.cpp has one graph an architecture, which looks for widths, biases and norms in its own places. Two of them read
heads and channels from arrays, one number a block: they carry models whose blocks differ in width. The tables hold from
release b8840 of llama.cpp; releases before it refuse biased query layers that are not as wide as the residual stream.
Which graph a model takes is decided in `gguf_choice.py`.
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


@dataclass(frozen=True)
class Source:
    """How models of one model_type store and name what differs between them."""

    architectures: tuple[str, ...]
    """llama.cpp's, the best known first."""
    activation: str = "hidden_act"
    epsilon: str = "rms_norm_eps"
    """Keys of the config; or the function itself, where the code has it."""
    fused: str | None = None
    """One layer for queries, keys and values, of which no head can go."""
    gated: bool = False
    """The query layer holds the rows of a head's gate behind those of its query."""
    interleaved: bool = False
    """It holds queries, key and value of one group after the other."""
    transposed: bool = False
    """Matrices inside blocks are stored input first."""
    shifted: bool = False
    """Norms are stored less one."""
    paired: bool = False
    """Consecutive entries of a head rotate together already."""
    mixed: bool = False
    """Blocks with a window have heads of another size, and the last blocks may attend with what earlier ones keep."""
    router: Literal["softmax", "sigmoid"] = "sigmoid"
    """What makes gates of a router's logits, where a file says so."""
    normed: bool | None = None
    """Gates add up to one: always, never, or as the config says."""
    turned: bool = False
    """Matrices of experts are stored input first ..."""
    alternating: bool = False
    """... with the outputs of gate and up in turn, and biases."""


SOURCES: dict[str, Source] = {
    "llama": Source(("llama", "deci")),
    "mistral": Source(("llama", "deci")),
    **dict.fromkeys(("cwm", "ministral", "seed_oss"), Source(("llama", "deci"))),
    **dict.fromkeys(("ernie4_5", "helium"), Source(("llama", "deci"), paired=True)),
    "ministral3": Source(("mistral3",)),
    "cohere": Source(("command-r",), epsilon="layer_norm_eps", paired=True),
    "cohere2": Source(("cohere2",), epsilon="layer_norm_eps", paired=True),
    "nemotron": Source(("nemotron",), epsilon="norm_eps", shifted=True),
    "jais2": Source(("jais2",), epsilon="layer_norm_eps"),
    "stablelm": Source(("stablelm",), epsilon="layer_norm_eps"),
    "phi": Source(("phi2",), epsilon="layer_norm_eps"),
    **{name: Source((name,)) for name in ("apertus", "arcee")},
    "granite": Source(("granite",)),
    "gemma": Source(("gemma",), shifted=True),
    "starcoder2": Source(("starcoder2",), epsilon="norm_epsilon"),
    "qwen2": Source(("qwen2", "llama", "deci")),
    "qwen3": Source(("qwen3", "openelm")),
    "phi3": Source(("phi3", "llama", "deci")),
    "mixtral": Source(("llama",), normed=True),
    "qwen2_moe": Source(("qwen2moe",)),
    "qwen3_moe": Source(("qwen3moe",)),
    "olmoe": Source(("olmoe",)),
    "granitemoe": Source(("granitemoe",), normed=True),
    "smollm3": Source(("smollm3",)),
    "glm": Source(("chatglm",), paired=True),
    "glm4": Source(("glm4",), paired=True),
    "exaone4": Source(("exaone4",)),
    "hunyuan_v1_dense": Source(("hunyuan-dense",)),
    "hunyuan_v1_moe": Source(("hunyuan-moe",), normed=True),
    "ernie4_5_moe": Source(("ernie4_5-moe",), paired=True, normed=True),
    "gpt_oss": Source(("gpt-oss",), normed=True, turned=True, alternating=True),
    "dots1": Source(("dots1",)),
    **dict.fromkeys(("glm4_moe", "solar_open"), Source(("glm4moe",))),
    "exaone_moe": Source(("exaone-moe",)),
    "minimax_m2": Source(("minimax-m2",), normed=True),
    "llama4_text": Source(("llama4",), normed=False, paired=True, turned=True),
    "mistral4": Source(("mistral4",), router="softmax"),
    "deepseek_v2": Source(("deepseek2",), router="softmax", normed=False),
    **dict.fromkeys(("deepseek_v3", "glm4_moe_lite", "youtu"), Source(("deepseek2",))),
    "olmo": Source(("olmo",)),
    **dict.fromkeys(("olmo2", "olmo3"), Source(("olmo2",))),
    "gemma2": Source(("gemma2",), activation="hidden_activation", shifted=True),
    "gemma3_text": Source(("gemma3",), activation="hidden_activation", shifted=True),
    "gemma4_text": Source(("gemma4",), activation="hidden_activation", normed=True, mixed=True),
    "gpt2": Source(("gpt2",), activation="activation_function", epsilon="layer_norm_epsilon", transposed=True),
    "gpt_neox": Source(("gptneox",), epsilon="layer_norm_eps"),
    "falcon": Source(("falcon",), activation="activation", epsilon="layer_norm_epsilon"),
    "bloom": Source(
        ("bloom",), activation="gelu", epsilon="layer_norm_epsilon", fused="query_key_value", interleaved=True
    ),
    "lfm2": Source(("lfm2",), activation="silu", epsilon="norm_eps"),
    "lfm2_moe": Source(("lfm2moe",), activation="silu", epsilon="norm_eps"),
    "qwen3_next": Source(("qwen3next",), shifted=True, gated=True),
    "qwen3_5_text": Source(("qwen35",), shifted=True, gated=True),
    "qwen3_5_moe_text": Source(("qwen35moe",), shifted=True, gated=True, normed=True),
    "mpt": Source(("mpt",), activation="gelu", epsilon="layer_norm_epsilon", fused="Wqkv"),
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), Source(("qwen2vl",))),
    "qwen3_vl_text": Source(("qwen3vl",)),
    "qwen3_vl_moe_text": Source(("qwen3vlmoe",)),
}
"""By model_type: a decoder's own, not that of the twin by which it is read. OPT and GPT-J are missing: llama.cpp has no
such graphs."""

OTHERWISE = {
    "phimoe": "norms without taking the mean off, and makes gates add up to one",
    "paligemma": "sees nothing ahead within a prompt",
}
"""What llama.cpp's graph of a model_type, or of the decoder in a multimodal one, does, and the model does not."""

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
