"""mlx-lm on MLX's CPU build opens folders of the format `stock`, and refuses folders of the format `hf`."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm import convert
from mlx_lm import load as mlx_load

from conftest import DENSE, IDS, apart, load, logits
from models import relative


def found(folder: Path) -> torch.Tensor:
    model, _ = mlx_load(str(folder))
    return torch.tensor(np.array(model(mx.array(IDS.numpy()))))


@pytest.mark.parametrize("case", [(row, "stock") for row in DENSE], ids="-".join)
def test_stock_folders_compute_the_same(folders, case, tmp_path):
    expected = logits(load(folders(case)))
    assert relative(found(folders(case)), expected) < 1e-5
    convert(str(folders(case)), mlx_path=str(tmp_path / "q8"), quantize=True, q_bits=8, q_group_size=32)
    assert 0 < apart(found(tmp_path / "q8"), expected) < 0.05


@pytest.mark.parametrize("case", [(row, "hf") for row in DENSE], ids="-".join)
def test_hf_folders_are_refused(folders, case):
    """If this works one day, docs/engines.md is out of date."""
    with pytest.raises((ValueError, KeyError), match=r"Missing \d+ parameters|experts"):
        mlx_load(str(folders(case)))
