"""Cut the vocabulary of a model in several ways, and measure what each way saves and costs.

    python benchmarks/vocabulary.py MODEL latin text:1 text:5 --texts TEXTS

TEXTS is a folder that texts.py wrote. The table has, for the whole vocabulary and for each value of `--vocabulary`:

- tokens, parameters (millions), and megabytes of the GGUF file in f16 and in Q8_0;
- tokens per second of prefill (512 tokens) and decoding in transformers (bfloat16) and in llama.cpp (Q8_0), on one
  thread; models take turns with the whole one, and figures are ratios to it;
- bits per byte of text on the kinds that the calibration text `general` contains (seen), and on those that it does not
  contain (unseen), each the mean of the kinds. All rows of the table are measured on the same text, which each
  tokenizer splits in its own way.

`--no-speed` leaves the speeds out. `--models` adds folders or files as further rows, such as pruned ones.
"""

import argparse
import statistics
import tempfile
from contextlib import suppress
from pathlib import Path
from statistics import mean

import torch

from basket import GROUPS
from secateur import open_checkpoint, trim
from secateur.base.errors import SecateurError
from secateur.base.services import Services
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.checkpoints.tokens import encode
from secateur.gguf.export import export
from secateur.measure.loading import load
from secateur.measure.speed import speeds
from secateur.text.documents import read_documents
from secateur.vocabulary.choose import bits_per_byte
from speed import NEW, PROMPT, opened, turn
from tables import put

CPU = torch.device("cpu")
WHOLE = "all"


def texts_of(checkpoint: Checkpoint, folder: Path, tokens: int) -> dict[str, str]:
    """Return a stretch of each kind of text: as much as some tokens of the whole vocabulary hold."""
    tokenizer = checkpoint.tokenizer()
    kinds = [kind for group in GROUPS.values() for kind in group if (folder / f"{kind}.evaluation.jsonl").exists()]
    # Conversations need a chat template.
    kinds = [kind for kind in kinds if kind != "chat" or tokenizer.chat_template]
    found = {}
    for kind in kinds:
        documents = read_documents(str(folder / f"{kind}.evaluation.jsonl"), tokenizer, characters=20 * tokens)
        found[kind] = tokenizer.decode(encode(tokenizer, "\n\n".join(documents))[:tokens])
    return found


def bits(checkpoint: Checkpoint, texts: dict[str, str]) -> dict[str, float]:
    """Return the bits per byte of each kind of text."""
    return {
        kind: bits_per_byte(checkpoint, text, length=128, device=CPU, services=Services())
        for kind, text in texts.items()
    }


def speed_ratios(whole: Path, cut: Path, files: tuple[Path, Path], repeats: int) -> list[float]:
    """Return the ratios of speeds to the whole model: prefill and decoding in transformers, then in llama.cpp."""
    models = [load(open_checkpoint(folder), torch.bfloat16, CPU, whole=True) for folder in (whole, cut)]
    found = speeds(models, prompt=PROMPT, new=NEW, repeats=repeats)
    with opened(files[0], 1) as before, opened(files[1], 1) as after:
        turns = [[turn(context, 1) for context in (before, after)] for _ in range(repeats + 1)]
    ratios = [[a / b for a, b in zip(*times, strict=True)] for times in turns[1:]]
    return [*found[1].over(found[0]), *map(statistics.median, zip(*ratios, strict=True))]


def row(name: str, model: Path, whole: Path | None, arguments: argparse.Namespace, texts: dict[str, str]) -> str:
    """Return a line of the table for a folder."""
    checkpoint = open_checkpoint(model)
    files = [model.with_suffix(f".{type}.gguf") for type in ("f16", "q8_0")]
    # Some architectures of llama.cpp hold one width for all blocks only.
    with suppress(SecateurError):
        for file in files:
            export(model, file, type=file.suffixes[-2].removeprefix("."), overwrite=True)
    parameters = sum(info.entries for info in checkpoint.weights.values()) / 1e6
    cells = [name, f"{checkpoint.config.vocab_size:,}", f"{parameters:.1f}"]
    cells += [f"{file.stat().st_size / 1e6:.1f}" if file.exists() else "" for file in files]
    if arguments.speed and whole is not None:
        ratios = speed_ratios(whole, model, (whole.with_suffix(".q8_0.gguf"), files[1]), arguments.repeats)
        cells += [f"{one:.2f}" for one in ratios]
    elif arguments.speed:
        cells += ["1.00"] * 4
    measured = bits(checkpoint, texts)
    cells += [f"{mean(measured[kind] for kind in texts if kind in kinds):.4f}" for kinds in GROUPS.values()]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("vocabularies", nargs="*")
    parser.add_argument("--models", nargs="*", default=[], type=Path)
    parser.add_argument("--texts", type=Path, required=True, help="folder that texts.py wrote")
    parser.add_argument("--tokens", type=int, default=2048, help="number of tokens of each kind of text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--speed", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dense = open_checkpoint(arguments.model)
    texts = texts_of(dense, arguments.texts, arguments.tokens)
    heads = ["vocabulary", "tokens", "parameters (M)", "f16 (MB)", "Q8_0 (MB)"]
    heads += ["prefill", "decoding", "prefill, llama.cpp", "decoding, llama.cpp"] if arguments.speed else []
    lines = ["| " + " | ".join([*heads, "seen", "unseen"]) + " |", "|" + "---|" * (len(heads) + 2)]
    print("\n".join(lines), flush=True)

    def say(name: str, model: Path, whole: Path | None) -> None:
        lines.append(row(name, model, whole, arguments, texts))
        print(lines[-1], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / WHOLE
        whole.symlink_to(dense.path, target_is_directory=True)
        say(WHOLE, whole, None)
        for wanted in arguments.vocabularies:
            cut = Path(folder) / wanted.replace(":", "-").replace("%", "-percent")
            trim(arguments.model, cut, vocabulary=wanted)
            say(wanted, cut, whole)
        for model in arguments.models:
            copy = Path(folder) / model.name
            copy.symlink_to(model.resolve(), target_is_directory=True)
            say(model.name, copy, whole)
    if arguments.out:
        put(arguments.out, f"vocabulary {Path(arguments.model).stem}", lines)


if __name__ == "__main__":
    main()
