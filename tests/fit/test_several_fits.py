"""Several fits of one plan, each to resampled rows of its own, and the mean of their weights."""

from typing import Any

import pytest
import torch
from test_recovery import WIDTHS
from torch import Tensor

from models import LENGTH, build, layers_of, logits_of, narrowed, relative, token_rows
from secateur.checkpoints.checkpoint import open_checkpoint
from secateur.criteria.registry import SCORED_KINDS
from secateur.fit import regression
from secateur.fit.loop import refit
from secateur.model.arena import Activations
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.plan.problem import Plan

TEXT, ONE, OTHER, HELD_OUT = (token_rows(count, LENGTH, seed=seed) for seed, count in enumerate((9, 7, 8, 3)))
NAMES = ["llama biased", "gpt2", "gemma2", "gemma3 biased", "opt", "gpt_neox", "granite biased"]


def plan_of(name: str, *blocks: int, **settings: Any) -> Plan:
    return Plan(dict.fromkeys(blocks or (0, 1, 2), WIDTHS[name]), 0.3, 0.3, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_the_mean_of_separate_fits(checkpoint_folder, name, monkeypatch):
    # Where units are given, fewer inputs are summed over, which rounds otherwise; bfloat16 would make much of that.
    monkeypatch.setattr(regression, "fast_dtype", lambda _: torch.float32)
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


@pytest.mark.parametrize("blocks", [(0, 1, 2), (1,)])
@pytest.mark.parametrize("name", NAMES)
def test_held_out_rows_run_through_the_dense_and_the_averaged_model(checkpoint_folder, monkeypatch, name, blocks):
    """After the last pruned block, only these rows run on."""
    stream, groups = BlockStream(open_checkpoint(checkpoint_folder(name))), set[tuple[int, int]]()
    seen, run = dict[str, Tensor](), stream.run_through
    monkeypatch.setattr(stream, "run_through", lambda *a, **more: groups.add((a[0], a[3])) or run(*a, **more))

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
    assert ((2, 0) in groups, (2, 3) in groups) == (2 in blocks, True)
