"""What `secateur doctor` says of folders and files; vLLM is asked in tests/serving."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import CheckpointFolder
from models import make_letters
from secateur import prune
from secateur.base.errors import SecateurError
from secateur.commands import doctor, doctor_probe
from secateur.commands.doctor import NEW, Engine, check_engines

SMALL: dict[str, Any] = {"calibration": "random", "samples": 8, "length": 16, "device": "cpu", "recovery": "none"}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are tried in this process: importing all of them anew takes longer than all else."""

    def run(command: list[str]) -> subprocess.CompletedProcess[str] | str:
        name, how = command[-2:]
        try:
            return subprocess.CompletedProcess(command, 0, json.dumps(doctor_probe.PROBES[name](json.loads(how))), "")
        except Exception as error:
            return str(error)

    monkeypatch.setattr(doctor, "_run", run)


def by_name(found: list[Engine]) -> dict[str, Engine]:
    return {engine.name: engine for engine in found}


@pytest.mark.usefixtures("here")
def test_what_runs_a_folder(tmp_path: Path, checkpoint_folder: CheckpointFolder) -> None:
    """Of widths block by block, with a block that has no heads."""
    prune(checkpoint_folder("llama"), tmp_path / "out", sparsity=0.3, **SMALL)
    make_letters().save_pretrained(tmp_path / "out")
    found = by_name(check_engines(tmp_path / "out"))
    assert found["transformers"].runs
    assert found["transformers"].message == f"writes {NEW} tokens"
    assert "trust_remote_code=True" in found["transformers"].command
    assert found["lm-eval"].runs, found["lm-eval"].message
    assert found["lm-eval"].message.startswith("scores a text, -")
    assert found["peft"].runs
    assert found["vLLM"] == Engine(
        "vLLM", None, None, "not installed", f"vllm serve {tmp_path / 'out'} --trust-remote-code"
    )
    assert "(deci)" in found["llama.cpp"].message


@pytest.mark.usefixtures("here")
def test_what_does_not(tmp_path: Path, checkpoint_folder: CheckpointFolder) -> None:
    """GPT-2 by block: vLLM's backend drops biases, and llama.cpp's graph has one width."""
    prune(checkpoint_folder("gpt2"), tmp_path / "out", sparsity=0.3, **SMALL)
    found = by_name(check_engines(tmp_path / "out"))
    assert found["vLLM"].message.startswith("not installed, and would not run it: its transformers backend cannot run")
    assert found["llama.cpp"].runs is False
    assert "one width for all blocks" in found["llama.cpp"].message


def test_code_that_is_not_ours_does_not_run(tmp_path: Path, checkpoint_folder: CheckpointFolder) -> None:
    prune(checkpoint_folder("llama"), tmp_path / "out", sparsity=0.3, **SMALL)
    with (tmp_path / "out" / "modeling_secateur.py").open("a") as file:
        file.write("raise SystemExit\n")
    with pytest.raises(SecateurError, match="opening the folder runs it; look at it, then say --trust-remote-code"):
        check_engines(tmp_path / "out")
    with pytest.raises(SecateurError, match="name one that secateur prune wrote"):
        check_engines(tmp_path / "missing")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_strangers_code_does_not_run(file: str, tmp_path: Path, checkpoint_folder: CheckpointFolder) -> None:
    """Beside our file, or where a config asks for it in another repository."""
    prune(checkpoint_folder("llama"), tmp_path / "out", sparsity=0.3, **SMALL)
    (tmp_path / "out" / "more.py").write_text("raise SystemExit\n")
    with pytest.raises(SecateurError, match=r"more\.py: .*opening the folder runs it"):
        check_engines(tmp_path / "out")
    (tmp_path / "out" / "more.py").unlink()
    stored = json.loads((tmp_path / "out" / file).read_text())
    stored.setdefault("auto_map", {})["AutoTokenizer"] = [None, "me/mine--more.Own"]
    (tmp_path / "out" / file).write_text(json.dumps(stored))
    with pytest.raises(SecateurError, match=f"{file}: .*opening the folder runs it"):
        check_engines(tmp_path / "out")


def test_a_file_for_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the program on the path, here a stand-in."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    program = tmp_path / "llama-cli"
    program.write_text('#!/bin/sh\n[ "$1" = -m ] && [ -f "$2" ] && echo "$4 Paris."\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    (found,) = check_engines(tmp_path / "model.gguf")
    assert (found.runs, found.message.split(":")[0]) == (None, "not installed")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    (found,) = check_engines(tmp_path / "model.gguf")
    assert (found.runs, found.message) == (True, "writes: The capital of France is Paris.")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('fine')", None),
        ("raise ValueError('no such layer')", "ValueError: no such layer"),
        ("import sys; sys.exit(3)", "ended with code 3"),
        ("import os; os.abort()", "ended by SIGABRT"),
        ("import time; time.sleep(60)", "has not finished in 0 minutes"),
    ],
)
def test_engines_that_fail(code: str, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LONGEST", 1.0)
    found = doctor._run([sys.executable, "-c", code])
    assert (said is None and not isinstance(found, str)) or found == said
