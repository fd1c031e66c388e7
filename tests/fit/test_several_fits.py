"""Several fits of one plan, each to resampled rows of its own, and the mean of their weights."""

from typing import Any

import pytest
import torch
from test_recovery import WIDTHS
from torch import Tensor

from models import LENGTH, blocks_of, build, layers_of, logits_of, narrowed, relative, selected, token_rows
from secateur.criteria.registry import SCORED_KINDS
from secateur.fit import block_regression
from secateur.fit.fitted_block import FittedBlock, mean_of
from secateur.fit.loop import refit
from secateur.model.arena import Activations
from secateur.model.checkpoint import open_checkpoint
from secateur.model.rows import OPENING_WEIGHT, Rows
from secateur.model.stream import BlockStream
from secateur.model.surgery import masked_weight
from secateur.plan.problem import Plan

TEXT, ONE, OTHER, HELD_OUT = (token_rows(count, LENGTH, seed=seed) for seed, count in enumerate((9, 7, 8, 3)))
NAMES = ["llama biased", "gpt2", "gemma2", "gemma3 biased", "opt", "gpt_neox", "granite biased"]


def plan_of(name: str, *blocks: int, **settings: Any) -> Plan:
    return Plan(dict.fromkeys(blocks or (0, 1, 2), WIDTHS[name]), 0.3, 0.3, **settings)


def groups_of(rows: Rows) -> list[int]:
    return [len(group) for group in rows.groups]


def test_each_fit_has_its_resampled_rows_and_the_common_rows():
    rows = Rows.of(TEXT).with_openings().with_resampled(ONE, OTHER).with_held_out(HELD_OUT)
    opened = len(rows.groups[1])
    assert rows.resampled == (2, 3)
    assert rows.weights == (1.0, OPENING_WEIGHT, 1.0, 1.0, 0.0)
    assert [groups_of(part) for part in rows.fits()] == [[9, opened, 7, 0, 0], [9, opened, 0, 8, 0]]
    assert groups_of(rows.weighted(False)) == [0, 0, 0, 0, 3]
    assert sum(len(rows.ids(at)) for at in rows.fits()[1].batches()) == 9 + opened + 8
    assert [groups_of(part) for part in Rows.of(TEXT).fits()] == [[9]]
    assert groups_of(Rows.of(TEXT).weighted(False)) == [0]


def test_only_the_first_fit_runs_the_rows_that_choose_units():
    rows = Rows.of(TEXT).with_resampled(ONE, OTHER).with_held_out(HELD_OUT).with_choice_rows(Rows.of(HELD_OUT))
    assert rows.resampled == (1, 2)
    first, second = rows.fits()
    assert (groups_of(first), first.choice_weights) == ([9, 7, 0, 0, 3], (0.0, 0.0, 0.0, 0.0, 1.0))
    assert (groups_of(second), second.choice_weights) == ([9, 0, 8, 0, 0], None)
    assert groups_of(rows.weighted(False)) == [0, 0, 0, 3, 0]


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_the_mean_of_separate_fits(checkpoint_folder, name, monkeypatch):
    # Where units are given, fewer inputs are summed over, which rounds otherwise; bfloat16 would make much of that.
    monkeypatch.setattr(block_regression, "fast_dtype", lambda _: torch.float32)
    stream = BlockStream(open_checkpoint(checkpoint_folder(name)))
    together = list(refit(stream, plan_of(name), Rows.of(TEXT).with_resampled(ONE, OTHER)))
    keeps = {block.index: block.keep for block in together}
    units = {index: {kind: keep[kind] for kind in SCORED_KINDS} for index, keep in keeps.items()}
    alone = [
        list(refit(stream, plan_of(name, units=units), Rows((TEXT, version), (1.0, 1.0)))) for version in (ONE, OTHER)
    ]
    chosen = list(refit(stream, plan_of(name), Rows((TEXT, ONE), (1.0, 1.0))))
    assert keeps == {block.index: block.keep for block in chosen}, "the first fit chooses"
    for mean, one, other in zip(together, *alone, strict=True):
        assert mean.changed.keys() == one.changed.keys() | other.changed.keys()
        for path in one.changed:
            torch.testing.assert_close(mean.changed[path], (one.changed[path] + other.changed[path]) / 2)
        assert max(relative(one.changed[path], other.changed[path]) for path in one.changed) > 1e-3
        for report, *parts in zip(mean.reports, one.reports, other.reports, strict=True):
            assert report.error == pytest.approx(sum(part.error for part in parts) / 2, rel=1e-3)
            assert report.relative == pytest.approx(sum(part.relative for part in parts) / 2, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fits", [1, 2])
def test_weights_are_rounded_to_the_output_dtype(checkpoint_folder, dtype, fits):
    stream, rows = BlockStream(open_checkpoint(checkpoint_folder("llama"))), Rows.of(TEXT)
    rows = rows.with_resampled(ONE, OTHER) if fits == 2 else rows
    for block in refit(stream, plan_of("llama"), rows, dtype=dtype):
        assert all(torch.equal(tensor, tensor.to(dtype).float()) for tensor in block.changed.values())


@pytest.mark.parametrize("blocks", [(0, 1, 2), (1,)])
@pytest.mark.parametrize("name", NAMES)
def test_held_out_rows_run_through_the_dense_and_the_averaged_model(checkpoint_folder, name, blocks):
    stream = BlockStream(open_checkpoint(checkpoint_folder(name)))
    seen: dict[str, Tensor] = {}

    def record_streams(dense: Activations, pruned: Activations) -> None:
        seen.update(dense=dense.parts[3].clone(), pruned=pruned.parts[3].clone())

    rows = Rows.of(TEXT).with_resampled(ONE, OTHER).with_held_out(HELD_OUT)
    found = list(refit(stream, plan_of(name, *blocks), rows, compare=record_streams))
    model = build(name)
    small = narrowed(model, {b.index: b.keep for b in found}, {b.index: b.changed for b in found})
    for kind, network in (("dense", model), ("pruned", small)):
        last: list[Tensor] = []
        layers_of(network)[-1].register_forward_hook(lambda _, __, z, last=last: last.append(z))
        logits_of(network, HELD_OUT)
        assert relative(seen[kind], last[0]) < 1e-4
    assert relative(seen["pruned"], seen["dense"]) > 1e-2


def test_an_unchanged_tensor_enters_the_mean_with_its_dense_values():
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.weight.data.fill_(3.0)
    keep = selected((0,), (0,))
    blocks = [FittedBlock(0, keep, {"weight": torch.ones(2, 2)}, ()), FittedBlock(0, keep, {}, ())]
    assert torch.equal(mean_of(blocks, layer, torch.float32).changed["weight"], torch.full((2, 2), 2.0))
    assert mean_of(blocks[:1], layer, torch.float32) is blocks[0]


@pytest.mark.parametrize("heads", [(), (0, 3)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_masked_weights_are_zero_for_removed_units_only(name, heads):
    model = build(name)
    module = blocks_of(model)[0].attention
    tensors = dict(layers_of(model)[0].named_parameters())
    masked = masked_weight(module, tensors, heads).movedim(module.output_projection.axis, 0)
    weight = tensors[module.output_projection.name].movedim(module.output_projection.axis, 0)
    for head in range(module.units):
        at = slice(head * module.size, (head + 1) * module.size)
        assert torch.equal(masked[at], weight[at] if head in heads else torch.zeros_like(weight[at]))
