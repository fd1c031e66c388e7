"""What llama.cpp's graphs compute, as a table.

llama.cpp has one graph an architecture, which looks for widths, biases and norms in its own places. Two of them read
heads and channels from arrays, one number a block: they carry models whose blocks differ in width. The tables hold from
release b8840 of llama.cpp; releases before it refuse biased query layers that are not as wide as the residual stream.
A family's entry names its graphs; which of them a model takes is decided in `gguf_choice.py`.
"""

from dataclasses import replace
from functools import partial

from secateur.formats.gguf_architecture import SCALINGS, Architecture
from secateur.formats.gguf_metadata import (
    attention_cap,
    experts_in_every_block,
    gemma_ratio,
    gpt2_ratio,
    logit_scale,
    parallel_residual,
    steepest_slope,
    xielu_parameters,
)
from secateur.formats.gguf_requirements import (
    BLOOM,
    COMMAND_R,
    EXAONE4,
    FALCON,
    GEMMA2,
    GEMMA4,
    GPT_OSS,
    LATENT,
    LFM2_MOE,
    LINEAR,
    MISTRAL4,
    MPT,
    OLMO2,
    SMOLLM3,
    SOME_WINDOWS,
    llama4,
)

QKV = frozenset({"attn_q", "attn_k", "attn_v"})
LEVEL2 = frozenset({"attn_output", "ffn_down"})
"""The output layers of both modules, to which a recovery may add biases."""
_ALL = QKV | LEVEL2 | {"ffn_gate", "ffn_up"}

_LLAMA = Architecture("llama", _ALL, pairs=True, scalings=SCALINGS | {"llama3", "longrope"}, normed=True)
_GEMMA3 = Architecture("gemma3", QKV, head_norms=True, windows=True, scalings=SCALINGS - {"yarn"}, activation="gelu")
_PHI3 = Architecture("phi3", QKV, square=True, fused_qkv=True, partial=True, scalings=SCALINGS | {"longrope"})
_QWEN3 = Architecture("qwen3", QKV, head_norms=True)
_OLMO2 = Architecture("olmo2", frozenset(), square=True, windows=True, output="stored")
_GLM = replace(_QWEN3, name="glm4moe", partial=True, leading=True)
_DEEPSEEK2 = replace(
    _GLM, name="deepseek2", partial=False, head_norms=False, latent=True, biases=frozenset(), requirements=LATENT
)
_LFM2 = replace(_QWEN3, name="lfm2", square=True, biases=frozenset(), final_norm="token_embd_norm.weight")
_NEXT = replace(
    _QWEN3, name="qwen3next", biases=frozenset(), partial=True, normed=True, linear="grouped", requirements=LINEAR
)
_QWEN35 = replace(_NEXT, name="qwen35", linear="tiled", sections="in turn")
_GPT = Architecture("gpt2", _ALL - {"ffn_gate"}, square=True, fused_qkv=True, activation="gelu", epsilon="layer")
_COHERE = Architecture(
    "command-r", frozenset(), square=True, pairs=True, output="tied", epsilon="layer", settings=(logit_scale,)
)
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
        replace(_LLAMA, name="smollm3", biases=frozenset(), requirements=(SMOLLM3,)),
        Architecture("glm4", QKV, pairs=True, fused_gate=True, partial=True),
        Architecture(
            "exaone4",
            frozenset(),
            square=True,
            head_norms=True,
            windows=True,
            requirements=(EXAONE4,),
        ),
        Architecture("hunyuan-dense", frozenset(), head_norms=True),
        Architecture("hunyuan-moe", frozenset(), head_norms=True, normed=True),
        replace(
            _LLAMA,
            name="ernie4_5-moe",
            biases=frozenset(),
            leading=True,
            normed=True,
            settings=(experts_in_every_block,),
        ),
        Architecture(
            "gpt-oss",
            QKV | {"attn_output"},
            windows=True,
            scalings=frozenset({"default", "yarn"}),
            rounds_yarn=False,
            normed=True,
            requirements=GPT_OSS,
        ),
        replace(_GLM, name="dots1", partial=False, ungrouped=True),
        _DEEPSEEK2,
        replace(_DEEPSEEK2, name="mistral4", partial=True, requirements=MISTRAL4),
        replace(
            _LLAMA,
            name="llama4",
            biases=frozenset(),
            normed=False,
            windows=True,
            requirements=(llama4,),
            settings=(experts_in_every_block,),
        ),
        Architecture("openelm", frozenset(), per_layer=True, head_norms=True, fused_qkv=True, output="tied"),
        replace(_PHI3, fused_gate=True),
        replace(_OLMO2, requirements=(OLMO2,)),
        replace(
            _GEMMA3,
            name="gemma2",
            head_norms=False,
            output="tied",
            always_windows=True,
            caps_logits=True,
            score_ratio=partial(gemma_ratio, deepest=46),
            requirements=(GEMMA2,),
            settings=(attention_cap,),
        ),
        replace(_GEMMA3, score_ratio=partial(gemma_ratio, deepest=62)),
        replace(
            _GEMMA3,
            name="gemma4",
            biases=frozenset(),
            per_layer=True,
            scalings=frozenset({"proportional"}),
            normed=True,
            windows_by_block=True,
            requirements=GEMMA4,
        ),
        replace(_GPT, needs_biases=True, score_ratio=gpt2_ratio),
        replace(_GPT, name="gptneox", needs_biases=True, partial=True, output="stored", settings=(parallel_residual,)),
        replace(_GPT, name="phi2", fused_qkv=False, needs_biases=True, partial=True, output="stored"),
        replace(_LLAMA, name="mistral3"),
        Architecture("chatglm", QKV, square=True, pairs=True, fused_gate=True, partial=True),
        replace(
            _GPT,
            name="falcon",
            biases=frozenset(),
            requirements=(FALCON,),
        ),
        replace(
            _GPT,
            name="bloom",
            needs_biases=True,
            distances=True,
            requirements=(BLOOM,),
        ),
        replace(
            _GPT,
            name="mpt",
            biases=frozenset(),
            distances=True,
            requirements=(MPT,),
            settings=(steepest_slope,),
        ),
        replace(_GLM, name="minimax-m2", biases=frozenset(), output="stored", leading=False),
        replace(_COHERE, requirements=(COMMAND_R,)),
        replace(_COHERE, name="cohere2", windows=True, requirements=(SOME_WINDOWS,)),
        _NEMOTRON,
        replace(_NEMOTRON, name="jais2", partial=False, needs_biases=True, ungrouped=True),
        replace(_NEMOTRON, name="stablelm", biases=QKV, activation="silu"),
        Architecture("olmo", frozenset(), square=True, pairs=True, final_norm=None, epsilon="layer"),
        replace(
            _QWEN3,
            name="apertus",
            biases=frozenset(),
            scalings=SCALINGS | {"llama3"},
            output="stored",
            activation="xielu",
            settings=(xielu_parameters,),
        ),
        _LFM2,
        replace(
            _LFM2,
            name="lfm2moe",
            leading=True,
            normed=True,
            routing=True,
            output="tied",
            requirements=(LFM2_MOE,),
        ),
        _NEXT,
        _QWEN35,
        replace(_QWEN35, name="qwen35moe"),
        replace(
            _GLM,
            name="exaone-moe",
            partial=False,
            windows=True,
            biases=frozenset(),
            output="stored",
            requirements=(SOME_WINDOWS,),
        ),
    )
}
"""By llama.cpp's name."""
