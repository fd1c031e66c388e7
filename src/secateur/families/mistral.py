"""Families of Mistral, and MiniMax-M2, whose experts are named as Mixtral's."""

from dataclasses import replace

from secateur.families.deepseek import LATENT_INPUT, LATENT_KEYS
from secateur.families.entry import Entry, Gguf, GgufInput, Stock, Vllm
from secateur.families.llama import LLAMA_GGUF

MIXTRAL_INPUT = GgufInput(renamed=(("mlp.", "block_sparse_moe."),))

FAMILIES = {
    "mistral": Entry(gguf=LLAMA_GGUF),
    "ministral": Entry(gguf=LLAMA_GGUF),
    "ministral3": Entry(gguf=Gguf(("mistral3",))),
    "mixtral": Entry(gguf=Gguf(("llama",), gating="softmax", gates_sum_to_one=True, input=MIXTRAL_INPUT)),
    "mistral4": Entry(
        stock=Stock(theta_key=None),
        gguf=Gguf(("mistral4",), keys=LATENT_KEYS, gating="softmax", input=replace(LATENT_INPUT, scales_queries=True)),
    ),
    "minimax_m2": Entry(
        gguf=Gguf(("minimax-m2",), gating="sigmoid", gates_sum_to_one=True, input=MIXTRAL_INPUT),
        vllm=Vllm(backend="its transformers backend does not know the router of minimax_m2; use --widths uniform"),
    ),
}
