"""Help, version, completion and the output options."""

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
        assert " ".join(commands) == "prune trim export retrain plan survey sizes eval doctor compare clean families"
    own = {
        "prune": "sparsity target plan blocks modules widths round criterion recovery recover ridge effort tau sigma "
        "calibration samples length refit-calibration refit-samples seed device revision trust-remote-code dtype "
        "format type survey dry-run overwrite restart memory family",
        "eval": "perplexity length tokens speed against device dtype revision trust-remote-code",
    }
    for command in commands:
        text = run(command, "--help").out
        options = f"json quiet verbose {own.get(command, '')}".split()
        assert [option for option in options if f"--{option} " not in text] == []
    panels = ["Target", "Method", "Calibration", "Output", "Computing", "Messages", "The paper's variants"]
    assert re.findall("─ ([A-Z][\\w' ]+) ─", run("prune", "--help").out)[2:] == panels


def test_help_names_the_extras_in_brackets(run):
    """Brackets are markup in help texts, unless they are escaped."""
    for command, extra in {"export": "llama", "eval": "tasks", "retrain": "lora"}.items():
        assert f"secateur[{extra}]" in run(command, "--help").out


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
