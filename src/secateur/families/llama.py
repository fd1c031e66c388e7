"""Families that are laid out as Llama, or nearly; a `Family` without arguments is Llama itself."""

from typing import Any

from secateur.families.entry import Experts, Family, Gguf, GgufInput, Stock

LLAMA_GGUF = Gguf(("llama", "deci"))


def _norms_of_maverick(file: Any) -> dict[str, bool]:
    """Return whether queries and keys are normed: not in Maverick, which llama.cpp recognises by its 128 experts.

    The norms have no weights.
    """
    return {"use_qk_norm": file.metadata["expert_count"] != 128}


FAMILIES = {
    # Meta's Llama, Code World Model and Llama 4.
    "llama": Family(
        stock=Stock(
            head_counts="divisors",
            fallback=("mistral", "MistralForCausalLM"),
            fallback_values=(("sliding_window", None),),
        ),
        gguf=LLAMA_GGUF,
    ),
    "cwm": Family(stock=Stock(head_counts="divisors", fallback=("ministral", "MinistralForCausalLM")), gguf=LLAMA_GGUF),
    "llama4_text": Family(
        feed_forward="feed_forward",
        experts=Experts(
            router="router",
            number="num_local_experts",
            expert_width="intermediate_size",
            shared_expert="shared_expert",
            returns_scores=True,
            scales_inputs=True,
            gates_sum_to_one=False,
            stacked=True,
            inputs_first=True,
        ),
        stock=Stock(channels_key="intermediate_size_mlp"),
        gguf=Gguf(
            ("llama4",),
            interleaved_rope=True,
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
    # Arcee's AFM.
    "arcee": Family(gate=None, stock=Stock(head_counts="divisors"), gguf=Gguf(("arcee",))),
    # The Swiss AI Initiative's Apertus.
    "apertus": Family(gate=None, activation="act_fn", gguf=Gguf(("apertus",))),
    # Cohere's families.
    "cohere": Family(
        heads_locked="its query and key norms differ from head to head",
        locked_if="use_qk_norm",
        gguf=Gguf(("command-r",), keys={"logit_scale": "logit_scale"}, epsilon="layer_norm_eps", interleaved_rope=True),
    ),
    "cohere2": Family(
        gguf=Gguf(("cohere2",), keys={"logit_scale": "logit_scale"}, epsilon="layer_norm_eps", interleaved_rope=True)
    ),
    # DiffLlama: Llama with differential attention.
    "diffllama": Family(
        heads_locked="its heads come in pairs, one from each half, and share a norm",
        stock=Stock(head_counts="dense"),
    ),
    # Baidu's ERNIE families.
    "ernie4_5": Family(gguf=Gguf(("llama", "deci"), interleaved_rope=True)),
    "ernie4_5_moe": Family(
        experts=Experts(
            number="moe_num_experts",
            experts_per_token="moe_k",
            shared_expert="shared_experts",
            gating="softmax",
            gates_sum_to_one=True,
            renamed=(("gate.moe_statics.", "moe_statics."),),
        ),
        gguf=Gguf(("ernie4_5-moe",), interleaved_rope=True, input=GgufInput()),
    ),
    # Kyutai's Helium.
    "helium": Family(stock=Stock(head_counts="dense"), gguf=Gguf(("llama", "deci"), interleaved_rope=True)),
    # Tencent's Hunyuan families.
    "hunyuan_v1_dense": Family(gguf=Gguf(("hunyuan-dense",))),
    "hunyuan_v1_moe": Family(
        experts=Experts(
            experts_per_token="moe_topk",
            expert_width="intermediate_size",
            shared_expert="shared_mlp",
            gating="softmax",
            gates_sum_to_one=True,
        ),
        gguf=Gguf(("hunyuan-moe",), input=GgufInput()),
    ),
    # Karpathy's nanochat.
    "nanochat": Family(up="fc1", gate=None, down="fc2"),
    # ByteDance's Seed-OSS.
    "seed_oss": Family(gguf=LLAMA_GGUF),
    # Hugging Face's SmolLM3; SmolLM and SmolLM2 are Llama models.
    "smollm3": Family(gguf=Gguf(("smollm3",))),
}
