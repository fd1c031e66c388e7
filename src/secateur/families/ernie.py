"""Baidu's ERNIE families."""

from secateur.families.entry import Experts, Family, Gguf, GgufInput

FAMILIES = {
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
        gguf=Gguf(("ernie4_5-moe",), interleaved_rope=True, input=GgufInput("ernie4_5-moe")),
    ),
}
