"""The notebook in examples/ runs from its first cell to its last, on a small model."""

import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


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


def test_the_notebook_has_no_outputs() -> None:
    assert not any(cell.get("outputs") for cell in CELLS)
