"""Every command and code block of the README and of `docs/`, every example and the notebook run, on a tiny model.

Defaults of sizes are smaller than the real ones, and a text replaces the hub's data sets; the pages are not changed.
"""

import doctest
import inspect
import io
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
import yaml
from command_line import Run
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import models as tiny
import secateur
from paper import recipe
from paper.__main__ import main as paper_main
from paper.__main__ import parser as paper_parser
from secateur.base.quiet import quiet
from secateur.cli.app import app
from secateur.families.registry import FAMILIES
from secateur.measure import evaluation
from secateur.model import axes
from secateur.model.structure import _DESCRIBERS, axis_kinds
from secateur.plan.target import parse_target
from secateur.retraining.options import Training
from secateur.steps.options import EFFORTS, Effort, Options, RunOptions
from secateur.text import documents
from secateur.vocabulary.selection import select

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
RECORDS = {"docs/results.md", "docs/log.md"}
"""Pages of past measurements on real models, with placeholders: their commands are not run."""
HISTORY = "docs/log.md"
"""Page that names options and files that no longer exist."""
ELSEWHERE = {
    r"pip install .+": "installs packages",
    r"secateur .+ --processes .+": "starts processes, as tests/steps/test_team.py does",
    r"vllm serve .+": "vLLM has an environment of its own, make test-vllm",
    r"llama-(server|quantize) .+": "these are llama.cpp's own programs",
    r"secateur doctor .+": "it starts a process for each engine, as tests/commands/test_doctor.py does",
    r"secateur eval .+ --tasks piqa,arc_easy": "lm-eval's own tasks read their data from the hub",
}
"""Patterns of commands that cannot run here, and the reasons."""
OF_OTHERS = {"--model-impl", "--nproc-per-node", "--methods", "--dither"}
OF_OTHERS |= {"--model", "--model_args", "--hf-path", "--no-deps"}
"""Options of vLLM, torchrun, benchmarks/quality.py and quantised.py, lm-eval, mlx-lm and pip."""

SMALL: dict[str, Any] = {"samples": 8, "length": 16, "tokens": 256, "overwrite": True}
"""Defaults while a page runs. Most commands of a page overwrite the same files."""
LLAMA = {**tiny.SIZES, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3}
LIKE_SMOLLM2 = LLAMA | HEADS | {"hidden_size": 72, "intermediate_size": 1536, "num_hidden_layers": 9}
MORE_ROWS = {
    "docs": lambda: AutoConfig.for_model("llama", **LLAMA, head_dim=8),
    "plans": lambda: AutoConfig.for_model("llama", **LIKE_SMOLLM2, head_dim=8),
}
"""Model that every page prunes, and model that the plans on the pages fit."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Block(NamedTuple):
    """Block of code on a page."""

    line: int
    language: str
    title: str | None
    text: str

    def commands(self) -> Iterator[tuple[int, str]]:
        """Yield command lines with their line numbers; lines that end in a backslash are joined."""
        start, parts = self.line, list[str]()
        for number, line in enumerate(self.text.split("\n"), self.line + 1):
            start = start if parts else number
            parts.append(line.strip().removesuffix("\\"))
            if not line.endswith("\\"):
                command = " ".join(parts).partition(" #")[0].strip()
                if command and not command.startswith("#"):
                    yield start, command
                parts = []


def source(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """Return all blocks of a page; the language of an indented block follows from its first word."""
    found: list[Block] = []
    lines = [*source(page).split("\n"), ""]
    at = 0
    while at < len(lines):
        start = at
        if fence := re.match(r"```(\w*)(?: title=\"(.+)\")?$", lines[at]):
            at = next(end for end in range(at + 1, len(lines)) if lines[end] == "```")
            found.append(Block(start + 1, fence[1], fence[2], "\n".join(lines[start + 1 : at])))
        elif lines[at].startswith("    ") and not lines[at - 1].strip():
            while lines[at].startswith("    "):
                at += 1
            text = "\n".join(line[4:] for line in lines[start:at])
            begins = re.match(r"(?:[A-Z_]+=\S+ )*(secateur|make|pip|python)\b|(import|from) ", text)
            language = "formula" if not begins else "bash" if begins[1] else "python"
            found.append(Block(start, language, None, text))
        at += 1
    return found


def options() -> dict[str, set[str]]:
    found: dict[str, Any] = typer.main.get_command(app).commands
    flags = {
        name: {flag for one in command.params for flag in (*one.opts, *one.secondary_opts)}
        for name, command in found.items()
    }
    return flags | {"paper": {flag for one in paper_parser()._actions for flag in one.option_strings}}


def unknown(words: list[str], of: dict[str, set[str]]) -> list[str]:
    """Return the options that a command does not have, or the command itself where there is no such command."""
    if words[0] not in of:
        return [words[0]]
    return [word for word in words[1:] if word.startswith("--") and word not in of[words[0]] | {"--help"}]


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder, with the models, texts and data that the pages name but do not create."""
    with quiet():
        model = tiny.build("docs")
        for name, weight in model.named_parameters():
            if "q_proj" in name:
                # Two heads of a block attend alike, and two sharply.
                weight.copy_(torch.cat([weight[:16] * 0.2, weight[16:] * 8]))
        model.bfloat16().save_pretrained(tmp_path / "MODEL")
        letters = tiny.make_letters()
        letters.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        letters.save_pretrained(tmp_path / "MODEL")
    shutil.copytree(tmp_path / "MODEL", tmp_path / "SmolLM2-135M")
    text = "".join(LETTERS[i * i * i % 101 % 26] for i in range(20_000))
    for name, length in {"text.txt": 20_000, "a.txt": 20_000, "held-out.txt": 2_000, "b.txt": 2_000}.items():
        (tmp_path / name).write_text(text[:length])
    chat = [{"role": "user", "content": text[:2000]}]
    write_lines(tmp_path / "chats.jsonl", [{"messages": chat}, {"text": text}])
    (tmp_path / "DATA").mkdir()
    items = [{"query": f"{letter}?", "choices": ["aa", "b", letter], "gold": 2} for letter in LETTERS]
    write_lines(tmp_path / "DATA" / "piqa_val.jsonl", items)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(documents, "data_set_documents", lambda *_: [text])
    return tmp_path


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make default sizes and recipes small."""
    for owner in (Options, RunOptions, Training):
        names = inspect.signature(owner).parameters
        sizes = SMALL | {"tokens": str(SMALL["tokens"])} if owner is Training else SMALL
        defaults = tuple(sizes.get(name, parameter.default) for name, parameter in names.items())
        monkeypatch.setattr(owner.__init__, "__defaults__", defaults)
        for name in set(names) & set(sizes):
            monkeypatch.setattr(owner, name, sizes[name])
    for one in app.registered_commands:
        taken = inspect.signature(one.callback)
        parameters = [
            parameter if parameter.default is None else parameter.replace(default=SMALL.get(name, parameter.default))
            for name, parameter in taken.parameters.items()
        ]
        monkeypatch.setattr(one.callback, "__signature__", taken.replace(parameters=parameters))
    monkeypatch.setitem(EFFORTS, "normal", Effort(fits=1, input_steps=1))
    # Otherwise the few tokens of the small model would all be kept.
    monkeypatch.setitem(select.__kwdefaults__, "multiple", 1)
    folder = tmp_path_factory.mktemp("recipes")
    for file in recipe.FOLDER.glob("*.yaml"):
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        raw["options"] |= {"samples": SMALL["samples"], "length": SMALL["length"]}
        raw["runs"] = dict(islice(raw.get("runs", {}).items(), 2))
        raw["grid"] = {axis: values[:1] for axis, values in raw.get("grid", {}).items()}
        raw["retrain"] = {}
        (folder / file.name).write_text(yaml.safe_dump(raw, sort_keys=False))
    monkeypatch.setattr(recipe, "FOLDER", folder)


@pytest.fixture
def restored_registries() -> Iterator[None]:
    """Restore the registries of families, kinds of units and transformers classes afterwards."""
    axis_kinds()
    tables: list[dict[Any, Any]] = [FAMILIES, MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, axes._KINDS]
    before, describers = [dict(table) for table in tables], {role: list(own) for role, own in _DESCRIBERS.items()}
    yield
    _DESCRIBERS.update(describers)
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


@pytest.mark.usefixtures("small", "restored_registries")
@pytest.mark.parametrize("page", [page for page in PAGES if page not in RECORDS])
def test_a_page_runs(page, place, run, monkeypatch):
    monkeypatch.syspath_prepend(place)  # examples import each other
    if any("model.gguf" in block.text for block in blocks(page)):
        how = ["--widths", "uniform", "--recovery", "none"]
        assert run("prune", "MODEL", "model.gguf", "--format", "gguf", *how).code == 0
    for block in blocks(page):
        if block.title is not None:
            (place / block.title).parent.mkdir(exist_ok=True)
            (place / block.title).write_text(block.text)
    for block in blocks(page):
        where = f"{page}:{block.line}"
        if block.language == "json":
            if "blocks" in json.loads(block.text):
                (place / "example.json").write_text(block.text)
                tiny.build("plans").save_pretrained(place / "PLANS")
                assert run("plan", "PLANS", "--plan", "example.json", "--calibration", "random").code == 0, where
        elif block.language == "python":
            exec(compile(block.text, where, "exec"), {"__name__": "__main__"})
        elif block.language == "bash":
            for line, command in block.commands():
                carry_out(command, f"{page}:{line}", run, monkeypatch)
        else:
            # Blocks of text are input of other programs.
            assert block.language in ("formula", "toml", "yaml", "text"), (
                f"{where}: this test cannot run {block.language}"
            )


def carry_out(command: str, where: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command line in this process, with the parts of shell syntax that the pages use."""
    if any(re.fullmatch(pattern, command) for pattern in ELSEWHERE):
        return
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    if words[0] == "make":
        return  # see test_every_make_line_has_a_target
    if words[:3] == ["python", "-m", "paper"]:
        assert paper_main(words[3:]) == 0, f"{where}: {command}"
        return
    assert words[0] == "secateur", f"{where}: this test does not know the command {words[0]}"
    if "<" in words:
        piped = Path(words.pop()).read_bytes()
        assert words.pop() == "<", where
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
    result = run(*words[1:])
    assert result.code == 0, f"{where}: {command}\n{result.err[-2000:]}"


def test_every_family_is_named() -> None:
    """The page of formats lists the families with an entry, and the README has their number."""
    assert f"\n{len(FAMILIES)} model types have an entry" in source("README.md")
    listed = source("docs/formats.md").partition("Families, by `model_type`: ")[2].partition(".")[0]
    assert re.findall(r"`(\w+)`", listed) == sorted(FAMILIES)


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY])
def test_every_option_exists(page: str) -> None:
    """Options are checked in commands that are not run, and in the text."""
    of, wrong = options(), list[str]()
    every = set().union(*of.values(), OF_OTHERS)
    for block in blocks(page):
        for line, command in block.commands() if block.language == "bash" else ():
            words = re.sub(r"^([A-Z_]+=\S+ )+", "", command).split()
            if words[0] == "secateur":
                wrong += [f"{page}:{line}: {name}" for name in unknown(words[1:], of)]
    for code in re.findall(r"`([^`\n]+)`", source(page)):
        words = code.split()
        if words[0] == "secateur" and len(words) > 1:
            wrong += [f"{page}: `{code}`: {name}" for name in unknown(words[1:], of)]
        else:
            wrong += [f"{page}: `{code}`" for word in words if word.startswith("--") and word not in every]
        if re.fullmatch(r"(params|bytes|kv|prefill|decode|ppl)=\S+", code):
            parse_target(code)
    assert not wrong


@pytest.mark.parametrize("page", PAGES)
def test_every_make_line_has_a_target(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", source("Makefile"), re.MULTILINE))
    code = [block.text for block in blocks(page)] + re.findall(r"`([^`\n]+)`", source(page))
    named = {name for text in code for name in re.findall(r"^make ([\w-]+)", text, re.MULTILINE)}
    assert named <= targets
    extras = {name for text in code for name in re.findall(r"pip install '\.\[(\w+)\]'", text)}
    assert all(re.search(rf"^{name} = ", source("pyproject.toml"), re.MULTILINE) for name in extras)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", source(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.is_file(), f"{page}: {link}"
        headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, f"{page}: {link}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY])
def test_every_file_exists(page: str) -> None:
    for path in re.findall(r"`([\w.]+/[\w./]+\.(?:py|md|html|yaml|svg))`", source(page)):
        assert any((folder / path).is_file() for folder in (ROOT, ROOT / "src" / "secateur", ROOT / "tests")), path


def test_the_map_names_every_file() -> None:
    package = ROOT / "src" / "secateur"
    files = {file for file in package.rglob("*") if file.is_file() and file.parent.name != "__pycache__"}
    there = {str(file.relative_to(package)) for file in files - set(package.glob("*/__init__.py"))}
    named: list[str] = []
    folder = None
    for line in source("docs/extend.md").partition("## Every file")[2].split("\n"):
        cell = line.split("|")[1] if line.startswith("|") else ""
        if not line:
            folder = None
        elif folder is None:
            folder = cell.strip(" `").removesuffix("/")
        elif folder == "src/secateur":
            named += re.findall(r"`([\w./]+)`", cell)
        elif (package / folder).is_dir():
            named += [f"{folder}/{name}" for name in re.findall(r"`([\w./]+)`", cell)]
    assert sorted(named) == sorted(set(named))
    assert set(named) == there


def test_every_promise_has_its_test() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", source("docs/quality.md"))
    assert len(named) > 15
    assert not [name for file, name in named if f"def {name}(" not in source(file)]


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len(source("README.md").split("\n")) <= 160
    # Tables, formulas and output of benchmarks may be wider.
    wide = ("|", "    ", "SmolLM2-135M-Instruct, ", "second-moment: ")
    assert max(len(line) for page in PAGES for line in source(page).split("\n") if not line.startswith(wide)) <= 120


SOURCE = Path(secateur.__file__).parents[1]
MODULES = [
    ".".join(file.relative_to(SOURCE).with_suffix("").parts)
    for file in sorted(SOURCE.glob("secateur/**/*.py"))
    if ">>> " in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_show(name: str) -> None:
    found = doctest.testmod(import_module(name))
    assert found.attempted
    assert not found.failed


CELLS = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]


def test_the_card_of_the_demo_says_what_the_demo_measures() -> None:
    measured = (ROOT / "demo" / "demo.py").read_text(encoding="utf-8").split('f"eval ')[1:]
    assert ["--report" in command.partition(")\n")[0] for command in measured] == [True, True]


def test_the_notebook_runs(letters_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = {"MODEL": str(letters_folder("llama")), "OPTIONS": {"sparsity": 0.4, "calibration": "random", "length": 16}}
    names: dict[str, Any] = {}
    for cell in (cell for cell in CELLS if cell["cell_type"] == "code"):
        lines = [line.rstrip("\n") for line in cell["source"] if not line.startswith("%")]
        for at, line in enumerate(lines):
            if (name := line.partition(" = ")[0]) in small:
                lines[at] = f"{name} = {small[name]!r}"
        exec("\n".join(lines), names)
    printed = capsys.readouterr().out
    sizes = [names[model].num_parameters() for model in ("model", "smaller")]
    assert "{:,} parameters before, {:,} after".format(*sizes) in printed
    assert (tmp_path / "smaller.gguf").stat().st_size > 0


@pytest.mark.usefixtures("restored_registries")
@pytest.mark.parametrize("name", ["in_python", "for_llama_cpp"])
def test_a_script_runs(letters_folder, tmp_path, monkeypatch, capsys, name):
    """The tiny model has few positions. tests/serving runs the script for vLLM."""
    monkeypatch.setattr(secateur, "prune", partial(secateur.prune, samples=4, length=16), raising=False)
    monkeypatch.setattr(secateur, "speeds", partial(secateur.speeds, prompt=16, new=4), raising=False)
    monkeypatch.setattr(evaluation, "evaluate", partial(evaluation.evaluate, length=16))
    out, text = tmp_path / f"out{'.gguf' if name == 'for_llama_cpp' else ''}", tmp_path / "text.txt"
    text.write_text("a b c d e " * 200)
    words = [str(letters_folder("llama")), str(out), *([str(text)] if name == "in_python" else [])]
    monkeypatch.setattr(sys, "argv", [name, *words, "--calibration", "random"])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert out.exists()
    assert ("parameters before" in printed and "out: perplexity" in printed) or "tokens/s read" in printed
