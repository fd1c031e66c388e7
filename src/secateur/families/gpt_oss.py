"""OpenAI's gpt-oss."""

from secateur.families.entry import Experts, Family, Gguf, GgufInput

FAMILIES = {
    "gpt_oss": Family(
        sinks="sinks",
        experts=Experts(
            router="router",
            number="num_local_experts",
            expert_width="intermediate_size",
            returns_scores=True,
            gating="softmax",
            gates_sum_to_one=True,
            stacked=True,
            inputs_first=True,
            alternating=True,
        ),
        gguf=Gguf(
            ("gpt-oss",),
            keys={"attention.sliding_window": "sliding_window"},
            activation="silu",
            input=GgufInput(),
        ),
    ),
}
