"""Gradients equal those of one backward pass of the whole model; LLM-Pruner's scores equal their formulas."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import STREAMED, VOCAB, blocks_of, build, layers_of, make_tokenizer, opened, relative, token_rows
from outputs import record_of
from secateur.base.progress import Silent
from secateur.criteria.llm_pruner import scored_matrices
from secateur.criteria.registry import SCORED_KINDS, all_criteria
from secateur.model.rows import Rows
from secateur.model.structure import PrunableModule
from secateur.model.surgery import entries
from secateur.model.units.heads import KV_GROUPS
from secateur.steps.prune import prune
from secateur.survey.gradients import gradient_scores, gradients
from secateur.text.calibration import calibration_rows

FROM_GRADIENTS = [name for name, one in all_criteria().items() if one.from_gradients is not None]
TOLERANCE = 1e-4
"""Largest allowed deviation of a gradient, relative to the largest gradient of its matrix."""


def some_rows() -> Rows:
    """Return rows of two lengths with different weights, one-token rows, and held-out rows."""
    groups = (token_rows(5, 24), token_rows(3, 17, seed=1), token_rows(4, 1, seed=2), token_rows(2, 20, seed=3))
    return Rows(groups, (1.0, 0.5, 0.01, 0.0))


def counted(rows: Rows) -> list[tuple[Tensor, float]]:
    """Return the rows with a weight, each with its weight."""
    pairs = zip(rows.groups, rows.weights, strict=True)
    return [(row[None], weight) for group, weight in pairs if weight and group.shape[1] > 1 for row in group]


def whole(model: Any, rows: Rows) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Return the loss of the whole model, and the gradients of each row's loss by parameter."""
    model.requires_grad_(True)
    names = [name for name, _ in model.named_parameters()]
    total, own = torch.zeros(()), []
    for ids, weight in counted(rows):
        logits = model(ids, use_cache=False).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        found = torch.autograd.grad(loss / (ids.shape[1] - 1), list(model.parameters()))
        own.append(dict(zip(names, found, strict=True)))
        total += weight * loss.detach()
    model.requires_grad_(False)
    return total / sum(weight * (ids.shape[1] - 1) for ids, weight in counted(rows)), own


def combined(rows: Rows, own: list[dict[str, Tensor]], name: str) -> tuple[Tensor, Tensor]:
    """Return the gradient of the whole loss, and the mean over rows of squared gradients, for one parameter."""
    weights = torch.tensor([weight for _, weight in counted(rows)])
    tokens = torch.tensor([ids.shape[1] - 1 for ids, _ in counted(rows)])
    stack = torch.stack([found[name] for found in own])
    by_token = weights * tokens / (weights * tokens).sum()
    return torch.tensordot(by_token, stack, 1), torch.tensordot(weights / weights.sum(), stack.square(), 1)


@pytest.mark.parametrize(("name", "squares"), [("llama", False), *((name, True) for name in STREAMED)])
def test_gradients_equal_the_whole_model(checkpoint_folder, name, squares):
    model, rows, seen = build(name), some_rows(), []
    prefix = opened(checkpoint_folder(name)).family.blocks
    _, own = whole(model, rows)
    for block in gradients(opened(checkpoint_folder(name)), rows, squares=squares):
        seen.append(block.index)
        modules = [blocks_of(model)[block.index].module(kind) for kind in SCORED_KINDS]
        assert set(block.gradient) == {name for module in modules for name in scored_matrices(module)}
        assert set(block.square) == (set(block.gradient) if squares else set())
        for path, found in block.gradient.items():
            gradient, square = combined(rows, own, f"{prefix}.{block.index}.{path}")
            assert relative(found, gradient) < TOLERANCE, (block.index, path)
            assert torch.equal(block.weights[path], model.get_parameter(f"{prefix}.{block.index}.{path}"))
            if squares:
                assert relative(block.square[path], square) < TOLERANCE, (block.index, path)
                # A sample is a row: the square of the whole gradient is something else.
                assert relative(gradient.square(), square) > 0.1
    assert seen == [*reversed(range(len(blocks_of(model))))]


def test_gradients_of_a_range_of_blocks(checkpoint_folder):
    """Earlier blocks only run forward; later blocks only pass the gradient on."""
    rows = some_rows()
    every = {b.index: b.gradient for b in gradients(opened(checkpoint_folder("llama")), rows)}
    (middle,) = gradients(opened(checkpoint_folder("llama")), rows, blocks=range(1, 2))
    assert middle.index == 1
    assert all(torch.equal(found, every[1][name]) for name, found in middle.gradient.items())


def columns(layer: nn.Module, module: PrunableModule, unit: int) -> Iterator[tuple[str, int, int, float]]:
    """Yield every row or column of a unit: tensor, axis, position, and the share that belongs to the unit."""
    for slab in (*module.input_projections, module.output_projection):
        # Biases do not count, nor does a head's sink.
        if layer.get_parameter(slab.name).dim() < 2:
            continue
        shared = slab.along == (KV_GROUPS,)
        share = 1 / module.per_group if shared else 1.0
        for entry in entries(slab, [unit // module.per_group if shared else unit]).tolist():
            yield slab.name, slab.axis, entry, share


@pytest.mark.parametrize(
    "name", ["llama", "llama biased", "gpt2", "phi3", "gpt_neox", "opt", "gemma2", "gpt_oss", "qwen2_moe some"]
)
def test_scores_equal_their_formulas(checkpoint_folder, name):
    model, rows = build(name), some_rows()
    stream = opened(checkpoint_folder(name))
    _, own = whole(model, rows)
    found = {criterion: gradient_scores(stream, rows, criterion) for criterion in FROM_GRADIENTS}
    for index, block in enumerate(blocks_of(model)):
        # Experts have none.
        for module in (module for module in block.modules if module.kind in SCORED_KINDS):
            wanted = torch.zeros(len(FROM_GRADIENTS), module.units, dtype=torch.float64)
            for unit in range(module.units):
                for path, axis, at, share in columns(layers_of(model)[index], module, unit):
                    full = f"{stream.family.blocks}.{index}.{path}"
                    w = model.get_parameter(full).select(axis, at).double()
                    g, h = (value.select(axis, at).double() for value in combined(rows, own, full))
                    parts = ((w @ g).abs(), (w * g).abs().sum(), (w * g - 0.5 * w * h * w).abs().sum())
                    wanted[:, unit] += share * torch.stack(parts)
            for criterion, values in zip(FROM_GRADIENTS, wanted, strict=True):
                torch.testing.assert_close(found[criterion][index, module.kind], values, rtol=2e-3, atol=1e-6)


SETTINGS: dict[str, Any] = {"calibration": "random", "samples": 12, "length": 16, "device": "cpu", "sparsity": 0.3}


class Bars(Silent):
    """Watcher that records the names of progress bars."""

    def __init__(self) -> None:
        self.drawn: list[str] = []

    def track(self, items: Any, what: str, done: int = 0) -> Any:
        self.drawn.append(what)
        yield from items


@pytest.mark.parametrize("criterion", sorted(FROM_GRADIENTS))
def test_prune_keeps_the_units_with_the_highest_scores(checkpoint_folder, tmp_path, criterion):
    bars = Bars()
    model = checkpoint_folder("llama")
    prune(model, tmp_path / "out", criterion=criterion, widths="uniform", watcher=bars, **SETTINGS)
    rows = calibration_rows(make_tokenizer(), "random", samples=12, length=16, seed=0, vocab_size=VOCAB)
    scores = gradient_scores(opened(model), rows, criterion)
    record = record_of(tmp_path / "out")
    for block in record["blocks"]:
        kept = scores[block["block"], "channels"].topk(block["width"]["channels"]).indices.tolist()
        assert block["channels"] == sorted(kept)
    assert bars.drawn.count("Gradients") == 1 + bars.drawn.count("Survey")
