"""Pruned folders in the newest transformers: caches, saving, dtypes, training and compilation."""

from pathlib import Path

import pytest
import torch

from conftest import IDS, MIXTURE, apart, load, logits, train
from models import relative

PROMPT = 20


def test_every_device_map_and_bfloat16_compute_the_same(folders, case):
    expected = logits(load(folders(case)))
    for place in ("cpu", "auto"):
        assert torch.equal(logits(load(folders(case), device_map=place)), expected)
    half = load(folders(case), dtype="bfloat16")
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert apart(logits(half), expected) < 0.05


def test_gradient_checkpointing_gives_the_same_losses(folders, case):
    losses = []
    for checkpointing in (False, True):
        model = load(folders(case)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses += train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-5)
    assert losses[1] < losses[0]


def test_no_new_graph_breaks(folders, case):
    def breaks(folder: Path) -> int:
        torch._dynamo.reset()
        return torch._dynamo.explain(load(folder))(IDS, use_cache=False).graph_break_count

    assert breaks(folders(case)) <= breaks(folders((case[0], "dense")))
    if case[0] != MIXTURE:
        # Dense mixtures break graphs too, as their experts run one at a time.
        model = load(folders(case))
        assert relative(logits(torch.compile(model, backend="aot_eager", fullgraph=True)), logits(model)) < 1e-5
