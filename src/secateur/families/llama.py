"""Families in the line of Llama."""

from typing import Any

from secateur.families.entry import DENSE_HEADS, Entry, Gguf, GgufInput, Stock, Vllm
from secateur.families.family import Experts

LLAMA_GGUF = Gguf(("llama", "deci"))
LOGIT_SCALE = {"logit_scale": "logit_scale"}
GRANITE_KEYS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
GRANITE_NAMES = (
    ("experts.gate_up_proj", "input_linear.weight"),
    ("experts.down_proj", "output_linear.weight"),
    ("router.weight", "router.layer.weight"),
)


def _norms_of_maverick(file: Any) -> dict[str, bool]:
    """Return whether queries and keys are normed: not in Maverick, which llama.cpp recognises by its 128 experts.

    The norms have no weights.
    """
    return {"use_qk_norm": file.metadata["expert_count"] != 128}


FAMILIES = {
    # Meta's Llama, Code World Model and Llama 4.
    "llama": Entry(
        stock=Stock(fallback=("mistral", "MistralForCausalLM"), fallback_values=(("sliding_window", None),)),
        gguf=LLAMA_GGUF,
    ),
    "cwm": Entry(stock=Stock(fallback=("ministral", "MinistralForCausalLM")), gguf=LLAMA_GGUF),
    "llama4_text": Entry(
        {
            # Gates multiply the inputs of experts.
            "experts": Experts(
                router="router",
                number="num_local_experts",
                expert_width="intermediate_size",
                shared_expert="shared_expert",
                returns_scores=True,
                scales_inputs=True,
                stacked=True,
                inputs_first=True,
            ),
            "feed_forward": "feed_forward",
            "others": (),
        },
        gguf=Gguf(
            ("llama4",),
            interleaved_rope=True,
            gating="sigmoid",
            gates_sum_to_one=False,
            input=GgufInput(
                config=_norms_of_maverick,
                fixed={
                    "attention_chunk_size": 8192,
                    "floor_scale": 8192,
                    "attn_scale": 0.1,
                    "attn_temperature_tuning": True,
                },
            ),
        ),
    ),
    # Ai2's OLMo families.
    "olmo": Entry(gguf=Gguf(("olmo",))),
    "olmo2": Entry(stock=Stock(scaling_type_key="type"), gguf=Gguf(("olmo2",))),
    "olmo3": Entry(gguf=Gguf(("olmo2",))),
    "olmoe": Entry(gguf=Gguf(("olmoe",), gating="softmax", input=GgufInput())),
    "flex_olmo": Entry(),
    # Arcee's AFM.
    "arcee": Entry(gguf=Gguf(("arcee",))),
    # The Swiss AI Initiative's Apertus.
    "apertus": Entry(gguf=Gguf(("apertus",))),
    # Baidu's ERNIE families.
    "ernie4_5": Entry(gguf=Gguf(("llama", "deci"), interleaved_rope=True)),
    "ernie4_5_moe": Entry(
        gguf=Gguf(
            ("ernie4_5-moe",),
            interleaved_rope=True,
            gating="softmax",
            gates_sum_to_one=True,
            input=GgufInput(renamed=(("gate.moe_statics.", "moe_statics."),)),
        )
    ),
    # ByteDance's Seed-OSS.
    "seed_oss": Entry(gguf=LLAMA_GGUF),
    # Cohere's families.
    "cohere": Entry(gguf=Gguf(("command-r",), keys=LOGIT_SCALE, epsilon="layer_norm_eps", interleaved_rope=True)),
    "cohere2": Entry(gguf=Gguf(("cohere2",), keys=LOGIT_SCALE, epsilon="layer_norm_eps", interleaved_rope=True)),
    # DiffLlama: Llama with differential attention.
    "diffllama": Entry({"heads_locked": "its heads come in pairs, one from each half, and share a norm"}),
    # Hugging Face's SmolLM3; SmolLM and SmolLM2 are Llama models.
    "smollm3": Entry(gguf=Gguf(("smollm3",))),
    # IBM's Granite families.
    "granite": Entry(gguf=Gguf(("granite",), keys=GRANITE_KEYS)),
    "granitemoe": Entry(
        DENSE_HEADS,
        gguf=Gguf(
            ("granitemoe",),
            keys=GRANITE_KEYS,
            gating="softmax",
            gates_sum_to_one=True,
            input=GgufInput(renamed=GRANITE_NAMES),
        ),
    ),
    # Karpathy's nanochat.
    "nanochat": Entry(),
    # Kyutai's Helium.
    "helium": Entry(gguf=Gguf(("llama", "deci"), interleaved_rope=True)),
    # Microsoft's Phi families.
    "phi": Entry(
        DENSE_HEADS,
        stock=Stock(partial_rotary_key="partial_rotary_factor"),
        gguf=Gguf(("phi2",), epsilon="layer_norm_eps"),
    ),
    "phi3": Entry(
        stock=Stock(partial_rotary_key="partial_rotary_factor", scaling_type_key="type"),
        gguf=Gguf(("phi3", "llama", "deci"), not_read_by_transformers={"attention.sliding_window": "sliding_window"}),
    ),
    "phimoe": Entry(
        DENSE_HEADS,
        gguf=Gguf(difference="normalises without subtracting the mean, and divides gates by their sum"),
        vllm=Vllm(backend="its transformers backend cannot run the attention of phimoe; use --widths uniform"),
    ),
    # Tencent's Hunyuan families.
    "hunyuan_v1_dense": Entry(gguf=Gguf(("hunyuan-dense",))),
    "hunyuan_v1_moe": Entry(gguf=Gguf(("hunyuan-moe",), gating="softmax", gates_sum_to_one=True, input=GgufInput())),
}
