"""IBM's Granite families."""

from secateur.families.entry import Experts, Family, Gguf, GgufInput, Stock

SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}

FAMILIES = {
    "granite": Family(residual_multiplier="residual_multiplier", gguf=Gguf(("granite",), keys=SCALES)),
    "granitemoe": Family(
        feed_forward="block_sparse_moe",
        residual_multiplier="residual_multiplier",
        experts=Experts(
            router="router",
            number="num_local_experts",
            expert_width="intermediate_size",
            gating="softmax",
            gates_sum_to_one=True,
            stacked=True,
            renamed=(
                ("experts.gate_up_proj", "input_linear.weight"),
                ("experts.down_proj", "output_linear.weight"),
                ("router.weight", "router.layer.weight"),
            ),
        ),
        stock=Stock(head_counts="dense"),
        gguf=Gguf(
            ("granitemoe",),
            keys=SCALES,
            input=GgufInput(),
        ),
    ),
}
