"""Tencent's Hunyuan families."""

from secateur.families.entry import Experts, Family, Gguf, GgufInput

FAMILIES = {
    "hunyuan_v1_dense": Family(gguf=Gguf(("hunyuan-dense",))),
    "hunyuan_v1_moe": Family(
        experts=Experts(
            experts_per_token="moe_topk",
            expert_width="intermediate_size",
            shared_expert="shared_mlp",
            gating="softmax",
            gates_sum_to_one=True,
        ),
        gguf=Gguf(("hunyuan-moe",), input=GgufInput("hunyuan-moe")),
    ),
}
