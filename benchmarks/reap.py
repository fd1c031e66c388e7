"""Remove experts by REAP with llm-compressor, calibrated on the same rows as `benchmarks/experts.py`.

    python benchmarks/reap.py MIXTURE OUT --calibration TEXT --share 0.25

The script needs an environment of its own with `llmcompressor` and this package, since the two require different
releases of transformers. `secateur eval MIXTURE OUT --perplexity TEXT --length 128` measures the loss of the result.
"""

import argparse
from pathlib import Path
from typing import Any

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
    items: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    data: Any = DataLoader(items, batch_size=1)
    # REAP scores an expert by its output on the tokens routed to it.
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
        # llm-compressor stores experts under names that Mixtral's class does not know.
        file = Path(given.out) / "model.safetensors"
        tensors = load_file(file)
        for old, new in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
            tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
