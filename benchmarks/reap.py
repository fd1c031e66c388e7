"""Another tool's REAP (llm-compressor), on the rows that `benchmarks/experts.py` takes, into a folder.

    python benchmarks/reap.py MIXTURE OUT --calibration TEXT --share 0.25

It runs in an environment of its own, which needs `llmcompressor` and this package: the two ask for different
releases of transformers. What the result loses is told by `secateur eval MIXTURE OUT --perplexity TEXT --length 128`.
"""

import argparse
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import REAPPruningModifier
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur import calibration_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    how = {"samples": given.samples, "length": 128, "vocab_size": model.config.vocab_size}
    rows = calibration_rows(tokenizer, given.calibration, seed=given.seed, **how)
    data = DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], batch_size=1)
    # The saliency is of what experts give to the tokens that meet them.
    oneshot(
        model=model,
        dataset=data,
        recipe=REAPPruningModifier(sparsity=given.share),
        moe_calibrate_all_experts=False,
        pipeline="sequential",
    )
    model.to(torch.bfloat16).save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    if model.config.model_type == "mixtral":
        # It stores experts under other names than Mixtral's classes look for.
        file = Path(given.out) / "model.safetensors"
        tensors = load_file(file)
        for old, new in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
            tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
