"""Google's Gemma families."""

from dataclasses import replace
from typing import Any

from secateur.families.entry import Experts, Family, Gguf, GgufInput, KvSharing, Stock

GEMMA_GGUF = Gguf(activation="hidden_activation")
GEMMA2 = Family(
    norm_offset=True,
    norm_after_attention="post_attention_layernorm",
    norm_after_feed_forward="post_feedforward_layernorm",
    norm_before_attention="input_layernorm",
    norm_before_feed_forward="pre_feedforward_layernorm",
    stock=Stock(heads="divisors"),
)
GEMMA4_KEYS = {
    "attention.sliding_window": "sliding_window",
    "attention.key_length": "global_head_dim",
    "attention.key_length_swa": "head_dim",
    "attention.shared_kv_layers": "num_kv_shared_layers",
    "embedding_length_per_layer_input": "hidden_size_per_layer_input",
    "final_logit_softcapping": "final_logit_softcapping",
}


def _kv_sharing(config: Any, attention: Any) -> KvSharing | None:
    """Return how an attention of Gemma 4 shares keys and values, which its last blocks take from earlier ones."""
    if not config.num_kv_shared_layers:
        return None
    lends = bool(attention.store_full_length_kv)
    if not lends and not attention.is_kv_shared_layer:
        return None
    entries = attention.k_proj.weight.shape[0] if lends else 0
    return KvSharing(attention.layer_type, lends, entries, attention.head_dim)


FAMILIES = {
    "gemma": Family(
        norm_offset=True,
        gguf=Gguf(("gemma",), unlike_inside={"paligemma": "sees nothing ahead within a prompt"}),
    ),
    "gemma2": replace(GEMMA2, gguf=replace(GEMMA_GGUF, architectures=("gemma2",), deepest=46)),
    "gemma3_text": replace(
        GEMMA2,
        stock=Stock(heads="divisors", local_theta="rope_local_base_freq"),
        gguf=replace(GEMMA_GGUF, architectures=("gemma3",), deepest=62),
    ),
    "gemma4_text": replace(
        GEMMA2,
        norm_offset=False,
        block_multiplier="layer_scalar",
        heads_locked="its windowed blocks have other heads than its blocks of full attention",
        per_layer_input="hidden_size_per_layer_input",
        kv_sharing=_kv_sharing,
        heads_by_layer_type=True,
        experts=Experts(
            router="router",
            experts_per_token="top_k_experts",
            parallel_norms=("pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"),
            gating="softmax",
            gates_sum_to_one=True,
            stacked=True,
        ),
        stock=Stock(theta=None, by_type=True),
        gguf=replace(
            GEMMA_GGUF,
            architectures=("gemma4",),
            input=GgufInput("gemma4", dense=True, keys=GEMMA4_KEYS, fixed={"norm_topk_prob": True}),
        ),
    ),
    "vaultgemma": Family(norm_offset=True, stock=Stock(heads="divisors")),
}
