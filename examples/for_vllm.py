"""Prune a model to the same widths in all blocks, and write text with it in vLLM.

    python examples/for_vllm.py MODEL OUT

With the same widths, vLLM runs the folder with its own class of the model. vLLM needs its own versions of torch and
transformers: install secateur into vLLM's environment, or prune elsewhere.
"""

import argparse
from typing import Any

from secateur import Bars, prune


def main(**settings: Any) -> None:
    """Run the example; `settings` are passed to vLLM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--calibration", default="general")
    parser.add_argument("--prompt", default="The sky is blue because")
    asked = parser.parse_args()
    how = {"sparsity": asked.sparsity, "calibration": asked.calibration}
    prune(asked.model, asked.out, widths="uniform", **how, watcher=Bars())

    from vllm import LLM, SamplingParams

    model = LLM(asked.out, **settings)
    (answer,) = model.generate([asked.prompt], SamplingParams(temperature=0.0, max_tokens=60))
    print(asked.prompt + answer.outputs[0].text)
    print(f"Serve it: vllm serve {asked.out}")


if __name__ == "__main__":
    main()
