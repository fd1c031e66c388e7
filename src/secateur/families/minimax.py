"""MiniMax's families."""

from dataclasses import replace

from secateur.families.entry import Family, Gguf, GgufInput, Vllm
from secateur.families.mistral import MIXTRAL_EXPERTS

FAMILIES = {
    "minimax_m2": Family(
        experts=replace(MIXTRAL_EXPERTS, router_bias="e_score_correction_bias", gates_sum_to_one=True),
        heads_locked="its query and key norms run across all heads",
        gguf=Gguf(("minimax-m2",), input=GgufInput("minimax-m2")),
        vllm=Vllm(
            backend="its transformers backend does not know the router of minimax_m2; use --widths uniform",
        ),
    ),
}
