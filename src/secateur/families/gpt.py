"""Families in the line of GPT-2: most have a feed-forward without a gate, norms with biases, or fused projections."""

from secateur.families.entry import Entry, Gguf, GgufInput, Stock, Vllm

FAMILIES = {
    # OpenAI's GPT-2.
    "gpt2": Entry(
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
    # EleutherAI's GPT-NeoX and Pythia.
    "gpt_neox": Entry(
        stock=Stock(theta_key="rotary_emb_base", partial_rotary_key="rotary_pct"),
        gguf=Gguf(("gptneox",), keys={"use_parallel_residual": "use_parallel_residual"}, epsilon="layer_norm_eps"),
    ),
    # EleutherAI's GPT-J, Salesforce's CodeGen and Meta's OPT. llama.cpp has no graph of them.
    "gptj": Entry(),
    "codegen": Entry(
        {"heads_locked": "its fused layer of queries, keys and values has four parts, each with a quarter of the heads"}
    ),
    "opt": Entry(),
    # Adept's Persimmon.
    "persimmon": Entry(stock=Stock(partial_rotary_key="partial_rotary_factor")),
    # NVIDIA's Nemotron.
    "nemotron": Entry(
        stock=Stock(partial_rotary_key="partial_rotary_factor"),
        gguf=Gguf(("nemotron",), epsilon="norm_eps"),
    ),
    # MBZUAI's Jais 2.
    "jais2": Entry(gguf=Gguf(("jais2",), epsilon="layer_norm_eps")),
    # Stability AI's StableLM.
    "stablelm": Entry(
        stock=Stock(partial_rotary_key="partial_rotary_factor"),
        gguf=Gguf(("stablelm",), epsilon="layer_norm_eps"),
    ),
    # BigCode's StarCoder2.
    "starcoder2": Entry(gguf=Gguf(("starcoder2",), epsilon="norm_epsilon")),
    # OpenAI's gpt-oss.
    "gpt_oss": Entry(
        gguf=Gguf(
            ("gpt-oss",),
            keys={"attention.sliding_window": "sliding_window"},
            activation="silu",
            gating="softmax",
            gates_sum_to_one=True,
            input=GgufInput(),
        )
    ),
}
