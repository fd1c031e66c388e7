"""`doctor`: which of the engines that are installed run a pruned model, each tried in a process of its own."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.json_files import parse_json
from secateur.base.progress import Silent, Watcher
from secateur.commands import doctor_probe
from secateur.formats.folder import Folder, format_of_folder, open_folder
from secateur.formats.gguf_choice import choose_architecture
from secateur.formats.gguf_model import GgufModel
from secateur.formats.gguf_tokenizer import vocabulary_of
from secateur.formats.per_layer import MODELING_FILE, widths_of
from secateur.model.checkpoint import Checkpoint
from secateur.model.tokens import encode

PROMPT = "The capital of France is"
NEW = 8
"""Tokens that an engine writes."""
LONGEST = 900
"""Seconds that an engine may take."""
NOT_HERE = "not installed"


class Engine(NamedTuple):
    """What was found about one engine."""

    name: str
    version: str | None
    """None where it is not installed."""
    runs: bool | None
    """None where it was not tried."""
    message: str
    command: str
    """The line or command that opens the model."""


def check_engines(out: str | Path, *, trust_remote_code: bool = False, watcher: Watcher | None = None) -> list[Engine]:
    """Open a pruned folder or .gguf file in every engine that is installed.

    transformers, vLLM and llama.cpp write some tokens, which should be the same ones; lm-eval scores a text, and peft
    adapts every layer that it finds. A folder's own code runs where it is the file that `prune` wrote.

    Args:
        trust_remote_code: run it in any case.

    Raises:
        SecateurError: no model is there, it is damaged, or its code is not secateur's.
    """
    path, watcher = local_path(out), watcher or Silent()
    if path.suffix == ".gguf" and path.is_file():
        with watcher.busy("Trying llama.cpp"):
            return [_llama_cpp(path)]
    with watcher.busy(f"Opening {path}"):
        checkpoint = open_folder(path)
        if (code := _foreign(path)) is not None and not trust_remote_code:
            raise SecateurError(
                f"{code}: another version's code, a changed one or a stranger's, and opening the folder runs it; look "
                "at it, then say --trust-remote-code"
            )
        kind = format_of_folder(path)
    how = {"out": str(path), "class": checkpoint.auto_class.__name__, "ids": _prompt(checkpoint), "new": NEW}
    how["trust"] = bool(kind.code) or trust_remote_code
    found: list[Engine] = []
    written: list[int] | None = None
    for name, (package, line) in _engines(checkpoint, path, kind).items():
        reason = _vllm(checkpoint, kind) if name == "vLLM" else None
        if (version := _version(package)) is None:
            says = NOT_HERE + (f", and would not run it: {reason}" if reason else "")
            found.append(Engine(name, None, None, says, line))
            continue
        with watcher.busy(f"Trying {name}"):
            runs, says, tokens = _tried(package, how)
        if runs and tokens is not None:
            written = tokens if written is None else written
            same = sum(one == other for one, other in zip(tokens, written, strict=True))
            says = f"writes {NEW} tokens" + ("" if tokens is written else f", {same} of them as transformers does")
        found.append(Engine(name, version, runs, f"{says}; {reason}" if reason and not runs else says, line))
    return [*found, _as_gguf(checkpoint, path)]


def _foreign(path: Path) -> Path | None:
    """What in a folder runs when it is opened, or says that something does, and is not the file that `prune` writes."""
    for file in sorted(path.glob("*.py")):
        if file.name != MODELING_FILE.name or file.read_bytes() != MODELING_FILE.read_bytes():
            return file
    for file in sorted(path.glob("*config.json")):
        try:
            found = parse_json(file.read_bytes())
        except ValueError:
            continue  # No engine reads it either.
        named = found.get("auto_map") if isinstance(found, dict) else None
        values = named.values() if isinstance(named, dict) else [named]
        classes = [one for value in values for one in (value if isinstance(value, list) else [value]) if one]
        if not all(str(one).startswith(f"{MODELING_FILE.stem}.") for one in classes):
            return file
    return None


def _engines(checkpoint: Checkpoint, path: Path, kind: type[Folder]) -> dict[str, tuple[str, str]]:
    """Name → package, and how a person opens the model with it."""
    loading = kind.how_to_load(checkpoint.auto_class.__name__, str(path))
    code = " --trust-remote-code" if loading.runs_code else ""
    args = f"pretrained={path}" + (",trust_remote_code=True" if loading.runs_code else "")
    return {
        "transformers": ("transformers", loading.expression),
        "vLLM": ("vllm", f"vllm serve {path}{code}"),
        "lm-eval": ("lm_eval", f"lm_eval --model hf --model_args {args} --tasks TASKS"),
        "peft": ("peft", 'get_peft_model(model, LoraConfig(target_modules="all-linear"))'),
    }


def _version(package: str) -> str | None:
    """None where it is not installed."""
    if importlib.util.find_spec(package) is None:
        return None
    names = importlib.metadata.packages_distributions().get(package, [package])
    return importlib.metadata.version(names[0])


def _vllm(checkpoint: Checkpoint, kind: type[Folder]) -> str | None:
    """What is known to keep vLLM from it."""
    widths, inside = widths_of(checkpoint.config), checkpoint.around is not None
    return kind.vllm_reason(checkpoint.config, widths, multimodal=inside)


def _prompt(checkpoint: Checkpoint) -> list[int]:
    """A beginning as token ids; any, where there is no tokenizer for it."""
    try:
        return encode(checkpoint.tokenizer(), PROMPT, special=True)[-NEW:]
    except SecateurError:
        return list(range(1, NEW))


def _tried(package: str, how: dict[str, object]) -> tuple[bool, str, list[int] | None]:
    """Whether an engine runs the model in a process of its own, what is to say, and the tokens that it wrote."""
    done = _run([sys.executable, "-m", doctor_probe.__name__, package, json.dumps(how)])
    if isinstance(done, str):
        return False, done, None
    said = json.loads(done.stdout.splitlines()[-1])
    return True, str(said["says"]), said.get("tokens")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str] | str:
    """What a process printed, or in one line why it failed."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, env=os.environ | quiet)
    except subprocess.TimeoutExpired:
        return f"has not finished in {LONGEST // 60:.0f} minutes"
    if done.returncode < 0:
        return f"ended by {signal.Signals(-done.returncode).name}"
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"ended with code {done.returncode}"
    return done


def _as_gguf(checkpoint: Checkpoint, path: Path) -> Engine:
    """Whether a folder can become a file for llama.cpp."""
    line = f"secateur export {path} {path.name}.gguf"
    try:
        model = GgufModel(checkpoint, widths_of(checkpoint.config))
        graph = choose_architecture(model, "f16")
        vocabulary_of(checkpoint.tokenizer(), checkpoint.config.vocab_size)
    except SecateurError as error:
        return Engine("llama.cpp", None, False, str(error).removeprefix(f"{checkpoint.source}: "), line)
    what = "it" if checkpoint.around is None else "its language model"
    says = f"takes {what} as a .gguf file ({graph.name}): export it, then examine that"
    return Engine("llama.cpp", None, None, says, line)


def _llama_cpp(path: Path) -> Engine:
    """Whether llama.cpp's own program runs a file; the newer one's name is tried first."""
    programs = ("llama-completion", "llama-cli")
    program = next(filter(None, map(shutil.which, programs)), None)
    line = f"llama-cli -m {path}"
    if program is None:
        return Engine("llama.cpp", None, None, f"{NOT_HERE}: neither {' nor '.join(programs)} is on the path", line)
    done = _run([program, "-m", str(path), "-p", PROMPT, "-n", str(NEW), "-no-cnv", "--temp", "0"])
    if isinstance(done, str):
        return Engine("llama.cpp", Path(program).name, False, done, line)
    text = " ".join(done.stdout.split())
    return Engine("llama.cpp", Path(program).name, bool(text), f"writes: {text[-80:]}" if text else "is silent", line)
