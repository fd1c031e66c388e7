"""The notebook in examples/ runs from its first cell to its last, on a small model."""

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import CheckpointFolder

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_runs(
    letters_folder: CheckpointFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"MODEL": str(letters_folder("llama")), "OPTIONS": {"sparsity": 0.4, "calibration": "random", "length": 16}}
    names: dict[str, Any] = {}
    for cell in code_cells():
        lines = [line for line in cell.splitlines() if not line.startswith("%")]
        for at, line in enumerate(lines):
            if (name := line.partition(" = ")[0]) in small:
                lines[at] = f"{name} = {small[name]!r}"
        exec("\n".join(lines), names)
    printed = capsys.readouterr().out
    assert (
        f"{names['model'].num_parameters():,} parameters before, {names['smaller'].num_parameters():,} after" in printed
    )
    assert (tmp_path / "smaller.gguf").stat().st_size > 0


def test_the_notebook_has_no_outputs() -> None:
    assert not any(cell.get("outputs") for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"])
