"""Prune a model, compare the result with the original, and write text with it.

    python examples/in_python.py MODEL OUT [TEXT]

MODEL is a folder, a hub id or a .gguf file, and OUT is the folder to write. TEXT is a file that both models are scored
on; use a text that the model was not calibrated with.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur import Bars, prune, register
from secateur.measure.evaluation import evaluate


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("text", nargs="?")
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--calibration", default="general")
    parser.add_argument("--prompt", default="The sky is blue because")
    asked = parser.parse_args()
    # If this is interrupted, the same call goes on.
    done = prune(asked.model, asked.out, sparsity=asked.sparsity, calibration=asked.calibration, watcher=Bars())
    print(f"{done.parameters[0]:,} parameters before, {done.parameters[1]:,} after")
    if asked.text:
        found = evaluate(asked.out, against=asked.model, texts=[asked.text], trust_remote_code=True)
        for one in found.models:
            print(f"{one.name}: perplexity {one.texts[asked.text].perplexity:.2f}")
    # With the class that secateur registers, no code from the folder runs.
    register()
    tokenizer, model = AutoTokenizer.from_pretrained(asked.out), AutoModelForCausalLM.from_pretrained(asked.out)
    inputs = tokenizer(asked.prompt, return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    print(tokenizer.decode(written[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
