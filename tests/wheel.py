"""Prune a tiny model with the installed package alone: nothing of the repository is on the path.

`python wheel.py FOLDER` works in an empty folder, and prints where the package lies. `make wheel` runs it in a fresh
environment, and a test with a wheel that was unpacked beside the other packages.
"""

import os
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def main() -> None:
    place = Path(sys.argv[1]).resolve()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "<s>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>").save_pretrained(place / "dense")
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **SIZES)).save_pretrained(place / "dense")

    def run(*words: str) -> str:
        # Neither the folder of this file nor the current one is searched for packages.
        apart = os.environ | {"PYTHONSAFEPATH": "1"}
        return subprocess.check_output([sys.executable, *words], cwd=place, env=apart, text=True)

    # The default text, which comes with the package.
    run("-m", "secateur", "prune", "dense", "out", "--samples", "4", "--length", "32", "--effort", "quick")
    run("-m", "secateur", "eval", "out", "--trust-remote-code", "--no-answers")
    assert (place / "out" / "model.safetensors").stat().st_size < (place / "dense" / "model.safetensors").stat().st_size
    print(run("-c", "import secateur; print(secateur.__file__)").strip())


if __name__ == "__main__":
    main()
