"""OpenAI's GPT-2."""

from secateur.families.entry import Family, Gguf, Stock, Vllm

FAMILIES = {
    "gpt2": Family(
        blocks="transformer.h",
        attention="attn",
        fused="c_attn",
        output="c_proj",
        ungrouped=True,
        up="c_fc",
        gate=None,
        down="c_proj",
        final_norm="transformer.ln_f",
        stock=Stock(channels_key="n_inner", head_counts="dense", theta_key=None),
        gguf=Gguf(
            ("gpt2",),
            activation="activation_function",
            epsilon="layer_norm_epsilon",
            transposed=True,
            not_read_by_transformers={
                "feed_forward_length": "n_inner",
                "context_length": "n_positions",
                "vocab_size": "vocab_size",
            },
        ),
        vllm=Vllm(
            backend="its transformers backend cannot run gpt2, dense or pruned: it drops the biases of c_attn, and "
            "the class reshapes what vLLM's attention returns to one row; prune channels only, in the stock format"
        ),
    ),
}
