"""Refit of unusual models and texts: still the least-squares solution in float64, and everything is finite."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recovery import RIDGE, matrix, run
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import CheckpointFolder
from models import SIZES, blocks_of, layers_of, relative, seen, token_rows
from outputs import edited_weights, error_of
from secateur.model.surgery import kept_inputs
from secateur.steps.prune import prune

IDS = token_rows(12, 20, seed=9)
DIM = 8
"""Entries of a head of the tiny Llama, whose six heads share three pairs of keys and values."""
Tensors = dict[str, Tensor]


def _attention(tensors: Tensors, index: int, name: str) -> Tensor:
    return tensors[f"model.layers.{index}.self_attn.{name}_proj.weight"]


def _massive(tensors: Tensors) -> None:
    """Activations with one entry that is ten thousand times the others."""
    for index in range(3):
        _attention(tensors, index, "v")[::DIM] *= 1e4
        tensors[f"model.layers.{index}.mlp.up_proj.weight"][3] *= 1e4


def _dead(tensors: Tensors) -> None:
    """A pair of heads, and every third channel, give nothing."""
    for index in range(3):
        _attention(tensors, index, "v")[:DIM] = 0
        tensors[f"model.layers.{index}.mlp.up_proj.weight"][::3] = 0


def _equal(tensors: Tensors) -> None:
    """The second head of each pair is the first once more."""
    for index in range(3):
        for name, axis in (("q", 0), ("o", 1)):
            heads = _attention(tensors, index, name).unflatten(axis, (3, 2, DIM)).movedim(axis + 1, 0)
            heads[1] = heads[0]


def _holes(tensors: Tensors) -> None:
    """Half of the vocabulary was never trained."""
    tensors["model.embed_tokens.weight"][::2] = 0


def _faint(tensors: Tensors) -> None:
    """Values that hardly count."""
    for index in range(3):
        _attention(tensors, index, "v").mul_(1e-2)


def _silent(tensors: Tensors) -> None:
    """Output projections of the first block are zero."""
    _attention(tensors, 0, "o").zero_()
    tensors["model.layers.0.mlp.down_proj.weight"].zero_()


def _nothing(_: Tensors) -> None:
    pass


CASES: dict[str, tuple[Callable[[Tensors], None], Tensor]] = {
    "constant": (_nothing, torch.full((4, 20), 7)),
    "one token": (_nothing, torch.tensor([[5]])),
    "fewer tokens than channels": (_nothing, IDS[:1, :8]),
    "massive activations": (_massive, IDS),
    "dead units": (_dead, IDS),
    "equal heads": (_equal, IDS),
    "holes in the vocabulary": (_holes, IDS),
    "faint values": (_faint, IDS),
    "zero outputs": (_silent, IDS),
}
ONE = SIZES | {"num_attention_heads": 1, "intermediate_size": 1, "head_dim": 8}
MORE_ROWS = {"one of each": lambda: AutoConfig.for_model("llama", **ONE)}


@pytest.fixture
def spoiled(tmp_path: Path, checkpoint_folder: CheckpointFolder) -> Callable[[str], Path]:
    """The tiny Llama, spoiled."""

    def folder(case: str) -> Path:
        place = shutil.copytree(checkpoint_folder("llama"), tmp_path / "model")
        with edited_weights(place) as tensors:
            CASES[case][0](tensors)
        return place

    return folder


def best(x: Tensor, t: Tensor, old: Tensor) -> Tensor:
    """Ridge regression in float64; inputs that are always zero keep their weights."""
    energy = x.square().sum(0)
    live = energy > 0
    gram = x[:, live].T @ x[:, live] + RIDGE * torch.diag(energy[live])
    change = torch.linalg.solve(gram, x[:, live].T @ (t - x @ old))
    weight = old.clone()
    weight[live] += change
    return weight


@pytest.mark.parametrize("case", CASES)
def test_the_refit_is_least_squares(spoiled, case):
    """The first attention against float64, as nothing is pruned before it; later blocks only have to be finite."""
    folder, ids = spoiled(case), CASES[case][1]
    found = run(folder, "llama", ids, cauchy_scale=1.0)
    for block in found:
        assert all(torch.isfinite(value).all() for value in block.changed.values())
        assert all(report.error >= 0 for report in block.reports)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    module = blocks_of(model)[0].modules[0]
    x, z = seen(model, 0, module.output_layer, ids)
    kept = kept_inputs(module, found[0].keep["heads"])
    old = matrix(layers_of(model)[0], module.output_layer)
    weight = found[0].changed.get(module.output_projection.name)
    weight = old[kept] if weight is None else weight.double().T[kept]
    # By what they give: of inputs that are alike, weights may be shared out otherwise.
    given, wanted = x[:, kept] @ weight, x[:, kept] @ best(x[:, kept], z, old[kept])
    assert (given - wanted).abs().max() <= 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_a_whole_run_is_finite(tmp_path, spoiled, case):
    """Survey, plan and fits with default options. Removing dead units alone leaves the output unchanged."""
    folder, ids = spoiled(case), CASES[case][1]
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{token - 4}" for token in ids.flatten().tolist() if token >= 4))
    how: dict[str, Any] = {"samples": min(len(ids), 4), "length": max(2, ids.shape[1]), "calibration": str(text)}
    if case == "one token":
        assert "tokens" in error_of(prune, folder, tmp_path / "out", sparsity=0.1, device="cpu", **how)
        return
    prune(folder, tmp_path / "out", sparsity=0.1, device="cpu", **how)
    models = [
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, trust_remote_code=True)
        for place in (folder, tmp_path / "out")
    ]
    with torch.no_grad():
        dense, small = (model(ids).logits for model in models)
    assert torch.isfinite(small).all()
    if case == "dead units":
        assert relative(small, dense) < 0.02


def test_a_module_of_one_unit_is_kept_or_removed_whole(tmp_path, checkpoint_folder):
    how = {"calibration": "random", "samples": 4, "length": 16, "device": "cpu"}
    found = prune(checkpoint_folder("one of each"), tmp_path / "out", sparsity=0.3, **how)
    assert all(width.heads in (0, 1) and width.channels in (0, 1) for width in found.pruned_widths())
    assert found.parameters[1] < found.parameters[0]
