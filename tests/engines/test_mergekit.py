"""mergekit merges a pruned folder with a copy of itself without changing it."""

import shutil
from typing import Any

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge

from conftest import load, logits
from models import relative
from secateur.formats.per_layer import MODELING_FILE

LAYERS = 3


@pytest.mark.parametrize("method", ["passthrough", "linear"])
def test_a_merge_with_its_copy_changes_nothing(folders, case, method, tmp_path):
    shutil.copytree(folders(case), tmp_path / "copy")
    recipe: dict[str, Any] = {"merge_method": method, "dtype": "float32"}
    if method == "linear":
        both = (folders(case), tmp_path / "copy")
        recipe["models"] = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in both]
    else:
        recipe["slices"] = [{"sources": [{"model": str(tmp_path / "copy"), "layer_range": [0, LAYERS]}]}]
    options = MergeOptions(copy_tokenizer=True, trust_remote_code=True)
    run_merge(MergeConfiguration.model_validate(recipe), str(tmp_path / "merged"), options)
    if case[1] == "hf":
        # mergekit does not copy the modeling file.
        assert not (tmp_path / "merged" / MODELING_FILE.name).exists()
        shutil.copy(folders(case) / MODELING_FILE.name, tmp_path / "merged")
    found, expected = logits(load(tmp_path / "merged")), logits(load(folders(case)))
    assert relative(found, expected) < 1e-6
    assert method == "linear" or torch.equal(found, expected)
