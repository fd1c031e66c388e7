"""`secateur doctor` on folders and files; tests/serving has vLLM."""

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest

from models import make_letters
from outputs import assert_error, edit_json
from secateur import prune
from secateur.commands import doctor, doctor_probe
from secateur.commands.doctor import NEW_TOKENS, Engine, check_engines

SMALL: dict[str, Any] = {"calibration": "random", "samples": 8, "length": 16, "device": "cpu", "recovery": "none"}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run engines in this process, because importing them in new processes takes long."""

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
def test_engines_run_a_folder_with_different_widths(tmp_path, checkpoint_folder):
    out = tmp_path / "out"
    prune(checkpoint_folder("llama"), out, sparsity=0.3, **SMALL)
    make_letters().save_pretrained(out)
    found = by_name(check_engines(out))
    assert all(found[name].runs for name in ("transformers", "lm-eval", "peft")), found
    assert found["transformers"].message == f"generates {NEW_TOKENS} tokens"
    assert "trust_remote_code=True" in found["transformers"].command
    assert found["lm-eval"].message.startswith("scores a text: -")
    assert found["vLLM"] == Engine("vLLM", None, None, "not installed", f"vllm serve {out} --trust-remote-code")
    assert "(deci)" in found["llama.cpp"].message


@pytest.mark.usefixtures("here")
def test_an_unsupported_folder_gets_reasons(tmp_path, checkpoint_folder):
    """A GPT-2 with a width for each block: vLLM drops biases, and llama.cpp's graph has one width."""
    prune(checkpoint_folder("gpt2"), tmp_path / "out", sparsity=0.3, **SMALL)
    found = by_name(check_engines(tmp_path / "out"))
    assert found["vLLM"].message.startswith("not installed, and could not run it: its transformers backend cannot run")
    assert found["llama.cpp"].runs is False
    assert "one width for all blocks" in found["llama.cpp"].message


def test_other_code_in_the_folder_does_not_run(tmp_path, checkpoint_folder):
    """Neither another or a changed Python file, nor code of another repository that a config names."""
    out = tmp_path / "out"
    prune(checkpoint_folder("llama"), out, sparsity=0.3, **SMALL)
    modeling = (out / "modeling_secateur.py").read_text()
    for file, text in (("more.py", ""), ("modeling_secateur.py", modeling)):
        (out / file).write_text(f"{text}raise SystemExit\n")
        assert_error(f"{file}: .*opening the folder runs it; read it, then add --trust-remote-code", check_engines, out)
    (out / "more.py").unlink()
    (out / "modeling_secateur.py").write_text(modeling)
    (out / "custom_generate").mkdir()
    (out / "custom_generate" / "generate.py").write_text("raise SystemExit\n")
    assert_error("generate.py: .*opening the folder runs it", check_engines, out)
    shutil.rmtree(out / "custom_generate")
    for file in ("tokenizer_config.json", "config.json"):
        edit_json(out / file, auto_map={"AutoTokenizer": [None, "me/mine--more.Own"]})
        assert_error(f"{file}: .*opening the folder runs it", check_engines, out)
    assert_error("name a folder that secateur prune wrote", check_engines, tmp_path / "missing")


def test_llama_cpp_runs_a_gguf_file(tmp_path, monkeypatch):
    """A shell script stands in for the program on the path."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    program = tmp_path / "llama-cli"
    program.write_text('#!/bin/sh\n[ "$1" = -m ] && [ -f "$2" ] && echo "$4 Paris."\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(doctor, "_version", lambda _: None)
    (found,) = check_engines(tmp_path / "model.gguf")
    assert found.runs is None
    assert found.message.startswith("not installed: neither llama-completion nor llama-cli is on the PATH; or pip")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    (found,) = check_engines(tmp_path / "model.gguf")
    assert (found.runs, found.message) == (True, "generates: The capital of France is Paris.")


@pytest.mark.usefixtures("here")
def test_the_library_of_llama_cpp_runs_a_gguf_file(tmp_path, letters_folder, monkeypatch):
    prune(letters_folder("llama"), tmp_path / "model.gguf", sparsity=0.3, format="gguf", **SMALL)
    monkeypatch.setenv("PATH", "/nowhere")
    (found,) = check_engines(tmp_path / "model.gguf")
    assert found.runs, found.message
    # The tokenizer has no spaces.
    assert found.message.startswith("generates: ThecapitalofFranceis")
    (tmp_path / "model.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:-4096])
    (found,) = check_engines(tmp_path / "model.gguf")
    assert found.runs is False


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('fine')", None),
        ("raise ValueError('no such layer')", "ValueError: no such layer"),
        ("import sys; sys.exit(3)", "ended with exit code 3"),
        ("import os; os.abort()", "was ended by SIGABRT"),
        ("import time; time.sleep(60)", "did not finish within 0 minutes"),
    ],
)
def test_a_failing_engine_gives_one_line(code, said, monkeypatch):
    monkeypatch.setattr(doctor, "TIMEOUT", 1.0)
    found = doctor._run([sys.executable, "-c", code])
    assert (said is None and not isinstance(found, str)) or found == said


def test_engines_import_nothing_from_the_current_folder(tmp_path, monkeypatch):
    """The current folder may be the model's, and its files are another person's."""
    (tmp_path / "shadow.py").touch()
    monkeypatch.chdir(tmp_path)
    assert doctor._run([sys.executable, "-c", "import shadow"]) == "ModuleNotFoundError: No module named 'shadow'"
