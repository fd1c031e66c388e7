"""Families of Mistral, and others with its experts."""

from dataclasses import replace

from secateur.families.deepseek import DEEPSEEK_EXPERTS, LATENT, LATENT_INPUT, LATENT_KEYS
from secateur.families.entry import Experts, Family, Gguf, GgufInput, Stock, Vllm
from secateur.families.llama import LLAMA_GGUF

W1_W2_W3 = (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",)))
"""Names of Mixtral's matrices in checkpoints."""
MIXTRAL_EXPERTS = Experts(
    stored=W1_W2_W3,
    number="num_local_experts",
    expert_width="intermediate_size",
    renamed=(("mlp.", "block_sparse_moe."),),
)

FAMILIES = {
    "mistral": Family(gguf=LLAMA_GGUF),
    "ministral": Family(gguf=LLAMA_GGUF),
    "ministral3": Family(gguf=Gguf(("mistral3",))),
    "mixtral": Family(
        experts=replace(MIXTRAL_EXPERTS, gating="softmax", gates_sum_to_one=True),
        gguf=Gguf(("llama",), input=GgufInput()),
    ),
    "mistral4": Family(
        latent=LATENT,
        experts=replace(DEEPSEEK_EXPERTS, gating="softmax", stacked=True),
        stock=Stock(theta_key=None),
        gguf=Gguf(
            ("mistral4",),
            keys=LATENT_KEYS,
            input=replace(LATENT_INPUT, scales_queries=True),
        ),
    ),
    # MiniMax-M2, whose experts are named as Mixtral's.
    "minimax_m2": Family(
        experts=replace(MIXTRAL_EXPERTS, router_bias="e_score_correction_bias", gates_sum_to_one=True),
        heads_locked="its query and key norms run across all heads",
        gguf=Gguf(("minimax-m2",), input=GgufInput()),
        vllm=Vllm(
            backend="its transformers backend does not know the router of minimax_m2; use --widths uniform",
        ),
    ),
}
