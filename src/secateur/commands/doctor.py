"""`doctor`: find out which installed engines run a pruned model, each in a separate process."""

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
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.json_files import parse_json
from secateur.base.progress import Silent, Watcher
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.checkpoints.tokens import encode
from secateur.commands import doctor_probe
from secateur.formats.folder import Folder, format_of_folder, open_folder
from secateur.formats.per_layer import MODELING_FILE
from secateur.gguf.architectures import choose_architecture
from secateur.gguf.model import GgufModel
from secateur.gguf.tokenizer import vocabulary_of
from secateur.model.per_layer import widths_of

PROMPT = "The capital of France is"
NEW_TOKENS = 8
"""Number of tokens that an engine generates."""
TIMEOUT = 900
"""Seconds that an engine may take."""
NOT_INSTALLED = "not installed"
LLAMA_CPP = "llama_cpp_py_sync"
"""Package with llama.cpp's library."""


class Engine(NamedTuple):
    """An engine, and whether it runs the model."""

    name: str
    version: str | None
    """Version of the engine; None if it is not installed."""
    runs: bool | None
    """Whether the engine runs the model; None if it was not tried."""
    message: str
    """Message about what the engine did, or why it does not run the model."""
    command: str
    """Line of Python or of the shell that opens the model in this engine."""


def check_engines(out: str | Path, *, trust_remote_code: bool = False, watcher: Watcher | None = None) -> list[Engine]:
    """Open a pruned model in every installed engine, each in a separate process.

    transformers, vLLM and llama.cpp generate some tokens, lm-eval scores a text, and peft adds LoRA to all layers.

    Args:
        out: A folder or .gguf file that secateur wrote.
        trust_remote_code: Run Python code in the folder even if it is not the file that `prune` writes.
        watcher: Receives progress.

    Raises:
        SecateurError: There is no model, the model is damaged, or it comes with other code and `trust_remote_code` is
            not set.
    """
    path, watcher = local_path(out), watcher or Silent()
    if path.suffix == ".gguf" and path.is_file():
        with watcher.busy("Trying llama.cpp"):
            return [_run_llama_cpp(path)]
    with watcher.busy(f"Opening {path}"):
        checkpoint = open_folder(path)
        if (code := _other_code(path)) is not None and not trust_remote_code:
            raise SecateurError(
                f"{code}: this is not the code that this version of secateur writes, and opening the folder runs it; "
                "read it, then add --trust-remote-code"
            )
        folder = format_of_folder(path)
    request = {
        "out": str(path.absolute()),
        "class": checkpoint.auto_class.__name__,
        "ids": _prompt_ids(checkpoint),
        "new": NEW_TOKENS,
        "trust": bool(folder.code) or trust_remote_code,
    }
    widths, multimodal = widths_of(checkpoint.config), checkpoint.multimodal_config is not None
    vllm_reason = folder.vllm_reason(checkpoint.config, widths, multimodal=multimodal)
    engines: list[Engine] = []
    expected: list[int] | None = None
    for name, (package, command) in _commands(checkpoint, path, folder).items():
        reason = vllm_reason if name == "vLLM" else None
        if (version := _version(package)) is None:
            message = NOT_INSTALLED + (f", and could not run it: {reason}" if reason else "")
            engines.append(Engine(name, None, None, message, command))
            continue
        with watcher.busy(f"Trying {name}"):
            runs, message, tokens = _try_engine(package, request)
        if tokens is not None:
            # transformers comes first; the others should generate the same tokens.
            message, expected = _compare(tokens, expected), expected or tokens
        engines.append(Engine(name, version, runs, f"{message}; {reason}" if reason and not runs else message, command))
    return [*engines, _as_gguf(checkpoint, path)]


def _compare(tokens: list[int], expected: list[int] | None) -> str:
    """Return how many tokens an engine generated, and how many of them equal the tokens of transformers."""
    if expected is None:
        return f"generates {NEW_TOKENS} tokens"
    same = sum(one == other for one, other in zip(tokens, expected, strict=True))
    return f"generates {NEW_TOKENS} tokens, {same} of them the same as transformers"


def _other_code(path: Path) -> Path | None:
    """Return a file whose code would run when the folder is opened, other than the modeling file that `prune` writes.

    The file is Python code, or a config that names such code in `auto_map`. transformers also runs code in the folder
    `custom_generate`.
    """
    for file in sorted(path.rglob("*.py")):
        if file != path / MODELING_FILE.name or file.read_bytes() != MODELING_FILE.read_bytes():
            return file
    for file in sorted(path.glob("*config.json")):
        try:
            config = parse_json(file.read_bytes())
        except ValueError:
            continue  # No engine can read this file either.
        named = config.get("auto_map") if isinstance(config, dict) else None
        values = named.values() if isinstance(named, dict) else [named]
        classes = [one for value in values for one in (value if isinstance(value, list) else [value]) if one]
        if not all(str(one).startswith(f"{MODELING_FILE.stem}.") for one in classes):
            return file
    return None


def _commands(checkpoint: Checkpoint, path: Path, folder: type[Folder]) -> dict[str, tuple[str, str]]:
    """Return the package of each engine, and the line that opens the model in it."""
    loading = folder.how_to_load(checkpoint.auto_class.__name__, str(path))
    flag, argument = (" --trust-remote-code", ",trust_remote_code=True") if loading.runs_code else ("", "")
    return {
        "transformers": ("transformers", loading.expression),
        "vLLM": ("vllm", f"vllm serve {path}{flag}"),
        "lm-eval": ("lm_eval", f"lm_eval --model hf --model_args pretrained={path}{argument} --tasks TASKS"),
        "peft": ("peft", 'get_peft_model(model, LoraConfig(target_modules="all-linear"))'),
    }


def _version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    if importlib.util.find_spec(package) is None:
        return None
    names = importlib.metadata.packages_distributions().get(package, [package])
    return importlib.metadata.version(names[0])


def _prompt_ids(checkpoint: Checkpoint) -> list[int]:
    """Return the token ids of a prompt; arbitrary ids without a tokenizer for it."""
    try:
        return encode(checkpoint.tokenizer(), PROMPT, special=True)[-NEW_TOKENS:]
    except SecateurError:
        return list(range(1, NEW_TOKENS))


def _try_engine(package: str, request: dict[str, object]) -> tuple[bool, str, list[int] | None]:
    """Return whether an engine runs the model, a message, and the tokens that it generated, if any."""
    done = _run([sys.executable, "-m", doctor_probe.__name__, package, json.dumps(request)])
    if isinstance(done, str):
        return False, done, None
    # Some engines print something when Python ends.
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return False, "ended without a result", None
    result = json.loads(lines[-1])
    return True, str(result["message"]), result.get("tokens")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str] | str:
    """Run a command, and return its result, or one line about why it failed.

    It runs in an empty folder, because Python imports modules from the current folder, which may be the model's.
    """
    settings = {"TRANSFORMERS_VERBOSITY": "error", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    if paths := os.environ.get("PYTHONPATH"):
        settings["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths.split(os.pathsep) if path)
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": TIMEOUT, "env": os.environ | settings}
    try:
        with TemporaryDirectory() as empty:
            # The text that a model writes may end in the middle of a character.
            done = subprocess.run(command, errors="replace", cwd=empty, **options)
    except subprocess.TimeoutExpired:
        return f"did not finish within {TIMEOUT // 60:.0f} minutes"
    if done.returncode < 0:
        return f"was ended by {signal.Signals(-done.returncode).name}"
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"ended with exit code {done.returncode}"
    return done


def _as_gguf(checkpoint: Checkpoint, path: Path) -> Engine:
    """Return whether the model can be exported to a file for llama.cpp."""
    command = f"secateur export {path} {path.name}.gguf"
    try:
        model = GgufModel(checkpoint, widths_of(checkpoint.config))
        architecture = choose_architecture(model)
        vocabulary_of(checkpoint.tokenizer(), checkpoint.config.vocab_size)
    except SecateurError as error:
        return Engine("llama.cpp", None, False, str(error).removeprefix(f"{checkpoint.source}: "), command)
    part = "it" if checkpoint.multimodal_config is None else "its language model"
    message = f"can run {part} as a .gguf file ({architecture.name}): export it, then run secateur doctor on that file"
    return Engine("llama.cpp", None, None, message, command)


def _run_llama_cpp(path: Path) -> Engine:
    """Return whether llama.cpp runs a .gguf file: its newer program, its older one, or else its library."""
    programs = ("llama-completion", "llama-cli")
    program = next(filter(None, map(shutil.which, programs)), None)
    command = f"llama-cli -m {path}"
    if program is None and (version := _version(LLAMA_CPP)) is not None:
        runs, message, _ = _try_engine(LLAMA_CPP, {"out": str(path.absolute()), "prompt": PROMPT, "new": NEW_TOKENS})
        return Engine("llama.cpp", version, runs, message, command)
    if program is None:
        message = f"{NOT_INSTALLED}: neither {' nor '.join(programs)} is on the PATH; or pip install 'secateur[llama]'"
        return Engine("llama.cpp", None, None, message, command)
    done = _run([program, "-m", str(path.absolute()), "-p", PROMPT, "-n", str(NEW_TOKENS), "-no-cnv", "--temp", "0"])
    if isinstance(done, str):
        return Engine("llama.cpp", Path(program).name, False, done, command)
    text = " ".join(done.stdout.split())
    message = f"generates: {text[-80:]}" if text else "generates nothing"
    return Engine("llama.cpp", Path(program).name, bool(text), message, command)
