"""Families in the line of GPT-2: most have a feed-forward without a gate, norms with biases, or fused projections."""

from dataclasses import replace

from secateur.families.entry import Family, Gguf, Stock, Vllm

_GPTJ = Family(
    blocks="transformer.h",
    attention="attn",
    output="out_proj",
    ungrouped=True,
    up="fc_in",
    gate=None,
    down="fc_out",
    final_norm="transformer.ln_f",
    stock=Stock(channels_key="n_inner", head_counts="dense", theta_key=None),
)

FAMILIES = {
    # OpenAI's GPT-2.
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
    # EleutherAI's GPT-NeoX and Pythia.
    "gpt_neox": Family(
        blocks="gpt_neox.layers",
        attention="attention",
        fused="query_key_value",
        interleaved=True,
        output="dense",
        ungrouped=True,
        up="dense_h_to_4h",
        gate=None,
        down="dense_4h_to_h",
        final_norm="gpt_neox.final_layer_norm",
        stock=Stock(head_counts="dense", theta_key="rotary_emb_base", partial_rotary_key="rotary_pct"),
        gguf=Gguf(("gptneox",), keys={"use_parallel_residual": "use_parallel_residual"}, epsilon="layer_norm_eps"),
    ),
    # EleutherAI's GPT-J. llama.cpp has no graph of it.
    "gptj": _GPTJ,
    # Salesforce's CodeGen.
    "codegen": replace(
        _GPTJ,
        fused="qkv_proj",
        heads_locked="its fused query, key and value layer is stored in four parts, each with a quarter of the heads",
    ),
    # Meta's OPT. llama.cpp has no graph of it.
    "opt": Family(
        blocks="model.decoder.layers",
        output="out_proj",
        ungrouped=True,
        feed_forward=None,
        up="fc1",
        gate=None,
        down="fc2",
        final_norm="model.decoder.final_layer_norm",
        pre_norm="do_layer_norm_before",
        stock=Stock(channels_key="ffn_dim", head_counts="dense", theta_key=None),
    ),
    # Adept's Persimmon.
    "persimmon": Family(
        fused="query_key_value",
        interleaved=True,
        output="dense",
        ungrouped=True,
        up="dense_h_to_4h",
        gate=None,
        down="dense_4h_to_h",
        final_norm="model.final_layernorm",
        stock=Stock(head_counts="dense", partial_rotary_key="partial_rotary_factor"),
    ),
    # NVIDIA's Nemotron.
    "nemotron": Family(
        gate=None,
        norm_offset=True,
        stock=Stock(partial_rotary_key="partial_rotary_factor"),
        gguf=Gguf(("nemotron",), epsilon="norm_eps"),
    ),
    # MBZUAI's Jais 2.
    "jais2": Family(gate=None, stock=Stock(head_counts="divisors"), gguf=Gguf(("jais2",), epsilon="layer_norm_eps")),
    # Stability AI's StableLM.
    "stablelm": Family(
        heads_locked="its query and key norms differ from head to head",
        locked_if="qk_layernorm",
        stock=Stock(head_counts="dense", partial_rotary_key="partial_rotary_factor"),
        gguf=Gguf(("stablelm",), epsilon="layer_norm_eps"),
    ),
    # BigCode's StarCoder2.
    "starcoder2": Family(up="c_fc", gate=None, down="c_proj", gguf=Gguf(("starcoder2",), epsilon="norm_epsilon")),
}
