"""Which of llama.cpp's architectures computes a model, and what keeps the others from it.

llama.cpp has one graph an architecture, which looks for widths, biases and norms in its own places. What the graphs
compute is a table, and a model takes the first one on its list that computes the same. Two of them read heads and
channels from arrays, one number a block: they carry models whose blocks differ in width. The table holds from release
b8840 of llama.cpp; releases before it refuse biased query layers that are not as wide as the residual stream.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import gguf
from gguf import GGMLQuantizationType

from secateur.base.errors import SecateurError
from secateur.model.checkpoint import Checkpoint
from secateur.model.families import Family, family_of, head_dim
from secateur.model.structure import Width, alike


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
    activation: Literal["silu", "gelu", "relu2"] = "silu"
    epsilon: Literal["rms", "layer"] = "rms"
    scales: bool = False
    """Embeddings, attention scores, module outputs and logits are each multiplied by a number of the file."""
    normed: bool | None = None
    """The gates of what a token meets add up to one: always, never, or as the file says."""
    leading: bool = False
    """The first blocks may have channels in place of experts."""
    latent: bool = False
    """All heads share one key and one value, a latent vector, and what each makes of it is put off."""


_LLAMA = Architecture("llama", _ALL, pairs=True, scalings=_SCALINGS | {"llama3", "longrope"}, normed=True)
_GEMMA3 = Architecture("gemma3", QKV, head_norms=True, windows=True, scalings=_SCALINGS - {"yarn"}, activation="gelu")
_PHI3 = Architecture("phi3", QKV, square=True, fused_qkv=True, partial=True, scalings=_SCALINGS | {"longrope"})
_QWEN3 = Architecture("qwen3", QKV, head_norms=True)
_OLMO2 = Architecture("olmo2", frozenset(), square=True, output="stored")
_GLM = replace(_QWEN3, name="glm4moe", partial=True, leading=True)
_GPT = Architecture("gpt2", _ALL - {"ffn_gate"}, square=True, fused_qkv=True, activation="gelu", epsilon="layer")

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
        _QWEN3,
        Architecture("qwen2moe", QKV, normed=False),
        replace(_QWEN3, name="qwen3moe", normed=True),
        replace(_OLMO2, name="olmoe", ungrouped=True, normed=False),
        replace(_LLAMA, name="granitemoe", scales=True),
        _GLM,
        replace(_LLAMA, name="smollm3", biases=frozenset()),
        Architecture("glm4", QKV, pairs=True, fused_gate=True, partial=True),
        Architecture("exaone4", frozenset(), square=True, head_norms=True),
        Architecture("hunyuan-dense", frozenset(), head_norms=True),
        Architecture("hunyuan-moe", frozenset(), head_norms=True, normed=True),
        replace(_LLAMA, name="ernie4_5-moe", biases=frozenset(), leading=True, normed=True),
        Architecture(
            "gpt-oss", QKV | {"attn_output"}, windows=True, scalings=frozenset({"default", "yarn"}), normed=True
        ),
        replace(_GLM, name="dots1", partial=False, ungrouped=True),
        replace(_GLM, name="deepseek2", partial=False, head_norms=False, latent=True, biases=frozenset()),
        Architecture("openelm", frozenset(), per_layer=True, head_norms=True, fused_qkv=True, output="tied"),
        replace(_PHI3, fused_gate=True),
        _OLMO2,
        replace(_GEMMA3, name="gemma2", head_norms=False, output="tied"),
        _GEMMA3,
        replace(_GPT, needs_biases=True),
        replace(_GPT, name="gptneox", needs_biases=True, partial=True, output="stored"),
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
    """Keys of the config."""
    transposed: bool = False
    """Matrices inside blocks are stored input first."""
    shifted: bool = False
    """Norms are stored less one."""
    paired: bool = False
    """Consecutive entries of a head rotate together already."""
    router: Literal["softmax", "sigmoid"] = "sigmoid"
    """What makes gates of a router's logits, where a file says so."""
    normed: bool | None = None
    """Gates add up to one: always, never, or as the config says."""
    turned: bool = False
    """Matrices of experts are stored input first, with the outputs of gate and up in turn."""


SOURCES: dict[str, Source] = {
    "llama": Source(("llama", "deci")),
    "mistral": Source(("llama", "deci")),
    **dict.fromkeys(("cwm", "ministral", "seed_oss"), Source(("llama", "deci"))),
    **dict.fromkeys(("ernie4_5", "helium"), Source(("llama", "deci"), paired=True)),
    "arcee": Source(("arcee",)),
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
    "glm4": Source(("glm4",), paired=True),
    "exaone4": Source(("exaone4",)),
    "hunyuan_v1_dense": Source(("hunyuan-dense",)),
    "hunyuan_v1_moe": Source(("hunyuan-moe",), normed=True),
    "ernie4_5_moe": Source(("ernie4_5-moe",), paired=True, normed=True),
    "gpt_oss": Source(("gpt-oss",), normed=True, turned=True),
    "dots1": Source(("dots1",)),
    "glm4_moe": Source(("glm4moe",)),
    "deepseek_v2": Source(("deepseek2",), router="softmax", normed=False),
    **dict.fromkeys(("deepseek_v3", "glm4_moe_lite", "youtu"), Source(("deepseek2",))),
    "olmo2": Source(("olmo2",)),
    "gemma2": Source(("gemma2",), activation="hidden_activation", shifted=True),
    "gemma3_text": Source(("gemma3",), activation="hidden_activation", shifted=True),
    "gpt2": Source(("gpt2",), activation="activation_function", epsilon="layer_norm_epsilon", transposed=True),
    "gpt_neox": Source(("gptneox",), epsilon="layer_norm_eps"),
}
"""By model_type. OPT is missing: llama.cpp has no such graph."""

_ACTIVATIONS = {
    "silu": {"silu", "swish"},
    "relu2": {"relu2"},
    "gelu": {"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"},
}
"""llama.cpp's name → transformers'; it has one gelu, and the exact one differs from it by less than 0.001."""

SWIGLU_LIMIT = 7.0
"""Of gpt-oss's activation, in llama.cpp."""

LEVEL2 = frozenset({"attn_output", "ffn_down"})
"""The output layers of both modules, to which a recovery may add biases."""


@dataclass
class Model:
    """A stored model, as far as the choice of an architecture asks."""

    checkpoint: Checkpoint
    widths: list[Width]
    added_biases: frozenset[str] = frozenset()
    """Of layers that will get one, where the model is still to be pruned."""
    family: Family = field(init=False)
    source: Source = field(init=False)
    inside: list[dict[str, str]] = field(init=False)
    """By block: name inside the block → stored name."""
    outside: list[str] = field(init=False)
    """Stored names of the other tensors."""

    def __post_init__(self) -> None:
        kind = self.config.model_type
        if self.checkpoint.around is not None:
            raise SecateurError(
                f"{self.checkpoint.source}: a multimodal model, which llama.cpp takes in two files; let its own "
                "converter make them of the pruned folder"
            )
        if kind not in SOURCES:
            raise SecateurError(
                f"{self.checkpoint.source}: llama.cpp has no architecture for {kind}; keep the safetensors folder"
            )
        self.source, self.family = SOURCES[kind], family_of(self.config)
        # Configs have no common way to say which blocks have no experts.
        self.widths = [
            replace(width, channels=self.config.intermediate_size, experts=0)
            if width.experts and not self.checkpoint.holds_experts(self.parameter(index, "down_proj"))
            else width
            for index, width in enumerate(self.widths)
        ]
        self.inside, self.outside = [{} for _ in self.widths], []
        in_block = re.compile(rf"(?:.*\.)?{self.family.blocks.rpartition('.')[2]}\.(\d+)\.(.+)")
        for stored in self.checkpoint.weights:
            if match := in_block.fullmatch(stored):
                self.inside[int(match[1])][match[2]] = stored
            else:
                self.outside.append(stored)

    @property
    def config(self) -> Any:
        """The config object."""
        return self.checkpoint.config

    @property
    def dim(self) -> int:
        """Entries per head."""
        return head_dim(self.config)

    @property
    def value_dim(self) -> int:
        """Entries that a head hands to the output layer."""
        return self.dim if self.family.latent is None else int(self.config.v_head_dim)

    @property
    def rope(self) -> dict[str, Any]:
        """Rotary settings of layers without a window; empty where positions are learned."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        return rope.get("full_attention", rope)

    @property
    def kind(self) -> str:
        """The kind of rotary scaling."""
        return self.rope.get("rope_type", "default")

    @property
    def rotated(self) -> int:
        """Rotated entries of a head."""
        return int(self.dim * self.rope.get("partial_rotary_factor", 1.0))

    @property
    def window(self) -> int | None:
        """How many positions a layer with a sliding window sees; None where no layer has one."""
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        return None if kinds and "sliding_attention" not in kinds else window

    @property
    def period(self) -> int | None:
        """Every how many blocks one sees everything; 0 for never, None where there is no such number."""
        kinds = [kind == "sliding_attention" for kind in self.config.layer_types]
        count = len(kinds)
        return next((p for p in range(count + 1) if kinds == [not p or i % p < p - 1 for i in range(count)]), None)

    @property
    def layers(self) -> dict[str, str]:
        """llama.cpp's names of the layers that pruning cuts → names inside a block; fused ones appear again."""
        family = self.family
        feed = "" if family.feed_forward is None else f"{family.feed_forward}."
        qkv = (family.fused,) * 3 if family.fused else (family.queries, family.keys, family.values)
        attention = dict(zip(("attn_q", "attn_k", "attn_v"), qkv, strict=True)) if family.latent is None else {}
        names = {
            layer: f"{family.attention}.{name}" for layer, name in (attention | {"attn_output": family.output}).items()
        }
        if family.experts is not None and all(width.experts for width in self.widths):
            return names
        if gate := family.fused_gate or family.gate:
            names["ffn_gate"] = feed + gate
        return names | {"ffn_up": feed + (family.fused_gate or family.up), "ffn_down": feed + family.down}

    @property
    def normed(self) -> bool:
        """Whether the gates of what a token meets add up to one."""
        return bool(self.config.norm_topk_prob) if self.source.normed is None else self.source.normed

    def parameter(self, index: int, leaf: str) -> str:
        """What transformers calls one of the tensors of a block's experts."""
        assert self.family.experts is not None
        return f"{self.family.blocks}.{index}.{self.family.feed_forward}.{self.family.experts.experts}.{leaf}"

    @property
    def biases(self) -> frozenset[str]:
        """Layers with a bias in some block."""
        stored = set().union(*self.inside)
        return self.added_biases | {layer for layer, name in self.layers.items() if f"{name}.bias" in stored}


def filled(channels: int, type: str) -> int:
    """Channels of whole rows. llama.cpp's graphs leave a block without any before its attention has been added."""
    multiple = TYPES[type].multiple
    return max(1, -(-channels // multiple)) * multiple


def in_file(width: Width, type: str) -> Width:
    """A width as a file has it."""
    return width if width.experts else replace(width, channels=filled(width.channels, type))


def choose(model: Model, type: str) -> Architecture:
    """The first architecture that computes the model.

    Raises:
        SecateurError: there is none; with what each one lacks and what would fit.
    """
    check_type(type)
    reasons = []
    # An architecture that leaves heads out comes first where there are none, as others keep an idle one.
    headless = any(not width.heads for width in model.widths)
    for name in sorted(model.source.architectures, key=lambda name: headless and not ARCHITECTURES[name].headless):
        reason = _obstacle(model, ARCHITECTURES[name], type)
        if reason is None:
            return ARCHITECTURES[name]
        reasons.append(f"{name} {reason}")
    raise SecateurError(
        f"{model.checkpoint.source}: no architecture of llama.cpp holds this model: {'; '.join(reasons)}"
    )


def check_type(type: str) -> None:
    """Raise `SecateurError` for a type that cannot be written, with the way to llama.cpp's others."""
    if type in TYPES:
        return
    if type.lower() in TYPES:
        raise SecateurError(f"type is '{type}'; write it {type.lower()}")
    known = ", ".join(TYPES)
    if re.fullmatch(r"i?q\d_.+", type.lower()):
        raise SecateurError(
            f"type {type} is made by llama.cpp's own llama-quantize from a file of type f16 or bf16; its K-quants take "
            f"rows that 256 divides, so prune with --round 256 (types here: {known})"
        )
    raise SecateurError(f"no type {type!r}; choose one of {known}")


def _obstacle(model: Model, architecture: Architecture, type: str) -> str | None:
    """What an architecture lacks for a model, as the rest of a sentence that begins with its name."""
    config, hidden = model.config, model.config.hidden_size
    widths = [in_file(width, type) for width in model.widths]
    experts = [bool(width.experts) for width in widths]
    around = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention", {})
    activation = getattr(config, model.source.activation)
    extra = model.biases - architecture.biases
    tied = bool(config.tie_word_embeddings)
    if not alike(widths) and not architecture.per_layer:
        return "has one width for all blocks, so prune all of them with uniform widths"
    if experts != sorted(experts) or (not all(experts) and any(experts) and not architecture.leading):
        return "has experts in all blocks" + (" behind the first ones" if architecture.leading else "")
    if len({width.channels for width in widths if width.experts}) > 1:
        return "has as many channels in all experts"
    if any(experts) and architecture.normed not in (None, model.normed):
        return "makes gates add up to one" if architecture.normed else "leaves gates as they are"
    if architecture.ungrouped and widths[0].groups != widths[0].heads:
        return "has as many key/value heads as query heads"
    if architecture.latent and (reason := _latent_obstacle(model)):
        return reason
    if architecture.square and widths[0].heads * model.dim != hidden:
        return f"wants heads x head size = {hidden}, so all {hidden // model.dim} heads"
    if activation not in _ACTIVATIONS[architecture.activation]:
        return f"computes {architecture.activation}, not {activation}"
    if extra:
        return f"has no place for the biases of {', '.join(sorted(extra))}"
    if model.kind not in architecture.scalings:
        return f"does not know {model.kind} rotary scaling"
    if architecture.name == "smollm3" and config.no_rope_layers != [int((i + 1) % 4 != 0) for i in range(len(widths))]:
        return "leaves positions out in every fourth block"
    if architecture.name == "exaone4" and model.window is not None:
        return "turns all positions where no block has a window, and this model has windows"
    if architecture.name == "gpt-oss":
        # Files that others make of it are rounded as well.
        if model.window is None or model.period != 2:
            return "has a window in every other block, the first one among them"
        if config.swiglu_limit != SWIGLU_LIMIT:
            return f"limits what experts compute to {SWIGLU_LIMIT:g}, and this model to {config.swiglu_limit:g}"
    elif model.kind == "yarn" and model.rope.get("truncate") is False:
        return "rounds the limits of yarn, which this model does not (truncate)"
    if around.get("rope_type", "default") != "default":
        return "does not scale the rotation of layers with a window"
    if model.rotated != model.dim and not architecture.partial:
        return f"rotates whole heads, and here {model.rotated} of {model.dim} entries are"
    if architecture.windows and model.window is not None and model.period is None:
        return "has windows at regular intervals only"
    if architecture.output == "tied" and not tied:
        return "has the embedding for its output matrix, and this model has another one (tie_word_embeddings)"
    if architecture.name == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        return "caps logits, which this model does not"
    if architecture.name != "gemma2" and getattr(config, "attn_logit_softcapping", None):
        return "does not cap attention logits, which this model does"
    return None


def _latent_obstacle(model: Model) -> str | None:
    """What the graph of latent attention lacks."""
    config, rope = model.config, model.rope
    if not min(width.heads for width in model.widths):
        return "has heads in all blocks"
    if not config.q_lora_rank and len(model.widths) not in (26, 27):
        return "has a latent vector for queries too, but in models of 26 and 27 blocks"
    if getattr(config, "attention_bias", False):
        return "has no place for the biases of what makes latent vectors"
    if not getattr(config, "rope_interleave", True):
        return "rotates neighbouring entries of a head, unlike this model"
    if model.kind == "yarn" and (rope.get("mscale_all_dim") or 0) != rope.get("mscale"):
        return "takes yarn's mscale and mscale_all_dim for the same number"
    if model.source.router == "softmax" and getattr(config, "topk_method", "greedy") != "greedy":
        return "chooses groups of experts by their best two, and this model by their best"
    return None


def gguf_obstacle(
    checkpoint: Checkpoint, widths: Sequence[Width], type: str = "f16", *, biases: bool = False
) -> str | None:
    """Why no GGUF file of a type can hold a model, pruned or not, at the widths of its blocks, or None.

    Reads no weights. With `biases`, the output layers of both modules get some.
    """
    try:
        choose(Model(checkpoint, list(widths), LEVEL2 if biases else frozenset()), type)
    except SecateurError as error:
        return str(error).removeprefix(f"{checkpoint.source}: ")
    return None
