"""Pruned folders compute the same in transformers 4.57 as in the version that wrote them.

The older transformers replaces the installed one in a separate process: `make test-transformers4` installs it into the
folder that the variable TRANSFORMERS4 names.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import CheckpointFolder
from models import MIXTURES, ROWS, SIMILAR, config_of, logits_of, relative, token_rows
from secateur import SecateurError, prune
from secateur.base.quiet import quiet

IDS = token_rows(2, 20, seed=3)
KNOWN = Path(os.environ["TRANSFORMERS4"]) / "transformers" / "models"
COMPUTED_DIFFERENTLY = {"glm4_moe groups", "bamba"}
"""Rows that 4.57 computes differently: it may route to experts outside the selected groups where scores are negative,
and its class of Bamba makes no cache."""
CASES = [
    name
    for name in ROWS | SIMILAR | MIXTURES
    if (KNOWN / config_of(name).model_type.removesuffix("_text")).is_dir() and name not in COMPUTED_DIFFERENTLY
]
"""Rows of families that transformers 4.57 knows."""
SMALL: dict[str, Any] = {"samples": 4, "length": 16, "calibration": "random", "sparsity": 0.4}
FORMATS: dict[str, dict[str, Any]] = {
    "hf": {"format": "hf"},
    "bias": {"format": "hf", "recovery": "bias"},
    "stock": {"widths": "uniform"},
    # For mixtures only: every expert has fewer channels.
    "narrow hf": {"format": "hf", "modules": ("channels",), "sparsity": 0.15},
    "narrow stock": {"widths": "uniform", "modules": ("channels",), "sparsity": 0.15},
}
# Eager attention, as the quick kernels of either version leave out what some families ask for.
LOAD = {"trust_remote_code": True, "attn_implementation": "eager"}
SCRIPT = f"""
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM
assert transformers.__version__.startswith("4.57."), transformers.__version__
ids, found = torch.load(sys.argv[1]), {{}}
for folder in json.load(sys.stdin):
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **{LOAD!r}).float().eval()
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
            start = model(ids[:, :-1], use_cache=True)
            last = model(ids[:, -1:], past_key_values=start.past_key_values).logits
    except Exception as error:
        found[folder] = f"{{type(error).__name__}}: {{error}}"
    else:
        found[folder] = (whole, last)
torch.save(found, sys.argv[2])
"""


class Folders:
    """Pruned folders of every row in every format, and their logits in transformers 4.57, computed in one process."""

    def __init__(self, place: Path, checkpoint_folder: CheckpointFolder):
        self.place = place
        self.written: dict[tuple[str, str], Path] = {}
        for row in CASES:
            for name, options in FORMATS.items():
                if "narrow" in name and row not in MIXTURES:
                    continue
                out = place / f"{row} {name}".replace(" ", "-")
                try:
                    prune(checkpoint_folder(row), out, **SMALL | options)
                except SecateurError:
                    # Other tests show which plans a stock class cannot hold.
                    assert "stock" in name, (row, name)
                    continue
                self.written[row, name] = out
        self.found = self._run()

    def _run(self) -> dict[str, tuple[Tensor, Tensor] | str]:
        torch.save(IDS, self.place / "ids")
        environment = {
            **os.environ,
            "PYTHONPATH": os.environ["TRANSFORMERS4"],
            "HF_MODULES_CACHE": str(self.place / "c"),
        }
        arguments = [sys.executable, "-c", SCRIPT, str(self.place / "ids"), str(self.place / "found")]
        text = json.dumps([str(folder) for folder in self.written.values()])
        done = subprocess.run(arguments, input=text, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return torch.load(self.place / "found")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: CheckpointFolder) -> Folders:
    return Folders(tmp_path_factory.mktemp("older"), checkpoint_folder)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("row", CASES)
def test_old_transformers_computes_the_same(folders, row, name):
    from transformers import AutoModelForCausalLM

    if (row, name) not in folders.written:
        assert "stock" in name or row not in MIXTURES
        return
    folder = folders.written[row, name]
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, **LOAD).float().eval()
    found = folders.found[str(folder)]
    if row in ("stablelm", "qwen2_moe", "qwen2_moe some") and name in ("hf", "bias"):
        # Their classes there take the width of all heads from the hidden size.
        assert "is invalid for input of size" in found
        return
    assert not isinstance(found, str), found
    whole, last = found
    # The parameters of Apertus' activation are bfloat16 there, whatever the model's are.
    assert relative(whole, logits_of(model, IDS)) < (1e-3 if row == "apertus" else 1e-5)
    assert relative(last[:, -1], whole[:, -1]) < 1e-4
