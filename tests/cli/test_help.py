"""Help, version, completion and the output options."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from command_line import SMALL


def test_version_and_help_list_commands_options_and_panels(run):
    import secateur

    assert run("--version") == (0, f"secateur {secateur.__version__}\n", "")
    for arguments in ([], ["--help"], ["-h"]):
        result = run(*arguments)
        assert result.code == 0
        commands = re.findall("^│ ([a-z]+)", result.out, flags=re.MULTILINE)
        wanted = "prune trim export retrain plan survey sizes eval doctor compare clean families"
        assert commands == wanted.split()
    text = run("prune", "--help").out
    target = "sparsity target plan blocks modules widths round"
    method = "criterion recovery recover ridge effort"
    rows = "calibration samples length refit-calibration refit-samples seed"
    other = "device revision trust-remote-code dtype format type survey dry-run overwrite restart memory family"
    for option in f"{target} {method} tau sigma {rows} {other}".split():
        assert f"--{option} " in text
    panels = ("Target", "Method", "Calibration", "Output", "Computing", "Messages", "The paper's variants")
    assert re.findall("─ ([A-Z][\\w' ]+) ─", text)[2:] == list(panels)
    text = run("eval", "--help").out
    options = "perplexity length tokens speed against json device dtype revision trust-remote-code"
    for option in options.split():
        assert f"--{option} " in text


def test_every_command_has_the_output_options(run):
    for command in re.findall("^│ ([a-z]+)", run("--help").out, flags=re.MULTILINE):
        text = run(command, "--help").out
        assert all(f"--{option} " in text for option in ("json", "quiet", "verbose")), command


def test_help_does_not_import_torch():
    code = (
        "import sys; sys.argv = ['secateur', 'prune', '--help']\n"
        "from secateur.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_bash_completes_commands_and_options():
    for words, wanted in (("secateur pr", "prune"), ("secateur prune --crit", "--criterion")):
        asked = {"_SECATEUR_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        command = [sys.executable, "-m", "secateur"]
        result = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=True)
        assert result.stdout.split() == [wanted]


def test_verbose_prints_the_traceback(place, run):
    few, many = (run("plan", "missing", *SMALL, *more) for more in ([], ["--verbose"]))
    assert few.code == many.code == 2
    assert few.err.count("\n") == 1
    assert "Traceback" in many.err
    assert many.err.splitlines()[-1] == few.err.strip()
