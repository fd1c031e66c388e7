"""Prune a model into a GGUF file, and compare its size and speed in llama.cpp with the original's.

    python examples/for_llama_cpp.py MODEL OUT.gguf

MODEL is a folder, a hub id or a .gguf file. It is also written as a file of the same type, which is then removed.
"""

import argparse
import tempfile
from pathlib import Path

from secateur import Bars, open_checkpoint, prune, speeds
from secateur.gguf.export import export
from secateur.measure.llama_cpp import LlamaCppFile, LlamaCppModel


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="q8_0", help="type of the weights in the file")
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--calibration", default="general")
    asked = parser.parse_args()
    how = {"sparsity": asked.sparsity, "calibration": asked.calibration, "type": asked.type}
    prune(asked.model, asked.out, format="gguf", **how, watcher=Bars())
    with tempfile.TemporaryDirectory() as place:
        # The folder of a .gguf file holds its weights as numbers of 16 bits.
        dense = export(open_checkpoint(asked.model).path, Path(place) / "dense.gguf", type=asked.type).path
        files = [dense, asked.out]
        found = speeds([LlamaCppModel(LlamaCppFile(str(file))) for file in files])
        for file, speed in zip(files, found, strict=True):
            size = file.stat().st_size / 1e6
            print(f"{file.name}: {size:,.1f} MB, {speed.prefill:,.0f} tokens/s read, {speed.decode:,.0f} written")
    print(f"Serve it: llama-server -m {asked.out}")


if __name__ == "__main__":
    main()
