"""Microsoft's Phi families."""

from dataclasses import replace

from secateur.families.entry import Family, Gguf, Stock, Vllm
from secateur.families.mistral import MIXTRAL_EXPERTS

FAMILIES = {
    "phi": Family(
        output="dense",
        up="fc1",
        gate=None,
        down="fc2",
        final_norm="model.final_layernorm",
        stock=Stock(head_counts="dense", partial_rotary_key="partial_rotary_factor"),
        gguf=Gguf(("phi2",), epsilon="layer_norm_eps"),
    ),
    "phi3": Family(
        fused="qkv_proj",
        gate=None,
        fused_gate="gate_up_proj",
        stock=Stock(fused_longrope=True, partial_rotary_key="partial_rotary_factor", scaling_type_key="type"),
        gguf=Gguf(("phi3", "llama", "deci"), not_read_by_transformers={"attention.sliding_window": "sliding_window"}),
    ),
    "phimoe": Family(
        experts=replace(
            MIXTRAL_EXPERTS, router="router", renamed=(("mlp.", "block_sparse_moe."), ("router.", "gate."))
        ),
        stock=Stock(head_counts="dense"),
        gguf=Gguf(difference="normalises without subtracting the mean, and divides gates by their sum"),
        vllm=Vllm(
            backend="its transformers backend cannot run the attention of phimoe; use --widths uniform",
        ),
    ),
}
