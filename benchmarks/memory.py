"""Peak memory of `prune` does not grow with depth: two random models, one ten times as deep, block for block alike.

    python benchmarks/memory.py

Each run is a process of its own; its peak resident set is what the operating system counted for it when it ended
(the figure that /usr/bin/time -v calls "Maximum resident set size").
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MAKE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
path, depth = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
config = LlamaConfig(vocab_size=512, hidden_size=1280, intermediate_size=3456, num_attention_heads=20,
    num_key_value_heads=10, num_hidden_layers=depth, max_position_embeddings=256, torch_dtype="float32")
LlamaForCausalLM(config).save_pretrained(path)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
"""


def peak(command: list[str]) -> int:
    """Peak resident bytes of a process and its children."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="4,40")
    parser.add_argument("--samples", default="8")
    arguments = parser.parse_args()
    idle = peak([sys.executable, "-c", "import secateur.commands.prune"])
    print(f"libraries alone: {idle / 1e6:.0f} MB")
    for depth in arguments.depths.split(","):
        with tempfile.TemporaryDirectory() as folder:
            model, out = Path(folder) / "model", Path(folder) / "out"
            peak([sys.executable, "-c", MAKE, str(model), depth])
            size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            command = [sys.executable, "-m", "secateur", "prune", str(model), str(out)]
            used = peak([*command, "--calibration", "random", "--samples", arguments.samples])
            block = size / int(depth)
            print(
                f"{depth} blocks of {block / 1e6:.0f} MB, {size / 1e6:.0f} MB in all: peak {used / 1e6:.0f} MB, "
                f"{(used - idle) / block:.1f} blocks above the libraries",
                flush=True,
            )


if __name__ == "__main__":
    main()
