"""Meta's families: Llama, Code World Model and Llama 4. A `Family` without arguments is laid out as Llama."""

from secateur.families.entry import Experts, Family, Gguf, GgufContents, GgufInput, Stock

LLAMA_GGUF = Gguf(("llama", "deci"))


def _norms_of_maverick(file: GgufContents) -> dict[str, bool]:
    """Return whether queries and keys are normed: not in Maverick, which llama.cpp recognises by its 128 experts.

    The norms have no weights.
    """
    return {"use_qk_norm": file.metadata["expert_count"] != 128}


FAMILIES = {
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
                "llama4",
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
}
