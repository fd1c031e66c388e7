"""FLAP's criteria and bias against their formulas, and the sizes that the methods of `benchmarks/peers.py` reach."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_criteria import MODELS, assert_scores, scores_of, statistics
from test_recovery import IDS, WIDTHS, output_error, pruned_model, run
from torch import Tensor

import peers
from models import blocks_of, build, layers_of, logits_of, narrowed, relative, seen, selected, token_rows
from secateur.checkpoints.checkpoint import open_checkpoint
from secateur.criteria.registry import SCORED_KINDS
from secateur.fit.fitted_block import FittedBlock
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.plan.problem import Plan
from secateur.steps.draw_rows import draw_rows
from secateur.steps.fit_blocks import fit_blocks
from secateur.steps.open_model import open_model

BIASES = ["llama", "llama biased", "gpt2", "opt", "gpt_neox"]


def metrics(weight: Tensor, inner: Tensor) -> dict[str, Tensor]:
    """FLAP's three metrics of every level-2 input; weight (a x o), inputs (n x a)."""
    variance = inner.var(0, correction=0)
    return {
        "flap-wifv": variance * (weight**2).sum(1),
        "flap-ifv": variance,
        "flap-wifn": weight.abs().mean(1) * (inner**2).mean(0).sqrt(),
    }


@pytest.mark.parametrize("criterion", ["flap-wifv", "flap-ifv", "flap-wifn"])
@pytest.mark.parametrize("kind", SCORED_KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_flap_scores_equal_their_formulas(name, kind, criterion):
    stats, _, inner, _ = statistics(name, kind)
    metric = metrics(stats.weight_ao.double(), inner.double())[criterion]
    assert_scores(scores_of(criterion, stats), metric.view(6, -1).square().sum(1) if kind == "heads" else metric)


def test_a_constant_input_has_a_score_of_zero():
    stats, _, inner, _ = statistics("llama", "channels")
    stats.moments = type(stats.moments)(72)
    stats.moments.update(torch.cat([inner[:, :-1], torch.full((len(inner), 1), 1e4 / 3)], dim=1))
    for criterion in ("flap-wifv", "flap-ifv"):
        scores = scores_of(criterion, stats)
        assert 0 <= float(scores[-1]) < 20 * stats.weight_ao.square().sum(1).max()


def asked(folder: Path, name: str) -> tuple[list[FittedBlock], Tensor]:
    """Return the blocks that `prune --recovery bias` fits, and its calibration rows."""
    options: dict[str, Any] = {"sparsity": 0.3, "criterion": "flap-wifv", "recovery": "bias"}
    run = open_model(folder, samples=64, length=16, calibration="random", device="cpu", **options)
    rows = draw_rows(run)
    plan = Plan(dict.fromkeys(range(3), WIDTHS[name]), 0.3, 0.3)
    return list(fit_blocks(run, rows, plan)), rows.selection


@pytest.mark.parametrize("whole", [False, True], ids=["the refit alone", "as prune asks for it"])
@pytest.mark.parametrize("name", BIASES)
def test_the_bias_preserves_the_mean_output(checkpoint_folder, name, whole):
    """Each module is measured on the outputs of the pruned modules before it."""
    if whole:
        found, ids = asked(checkpoint_folder(name), name)
    else:
        found, ids = run(checkpoint_folder(name), name, method="bias", criterion="flap-wifv", when="both"), IDS
        assert found[-1].reports[-1].relative == pytest.approx(output_error(name, found), rel=1e-3)
    dense, pruned = build(name), pruned_model(name, found)
    for block in found:
        modules, stored = blocks_of(dense)[block.index].modules, dict(layers_of(dense)[block.index].named_parameters())
        weights = {module.output_projection.name for module in modules}
        assert block.changed.keys() == weights | {module.bias_name for module in modules}
        assert all(torch.equal(block.changed[weight], stored[weight]) for weight in weights)
        described = blocks_of(dense)[block.index]
        keeps = {b.index: b.keep for b in found[: block.index]}
        changed: dict[int, dict[str, Tensor]] = {b.index: b.changed for b in found[: block.index]}
        for module in described.modules:
            whole = narrowed(dense, keeps, changed)
            outputs = [seen(one, block.index, module.output_layer, ids)[1].double() for one in (pruned, whole)]
            assert relative(*(output.mean(0) for output in outputs)) < 2e-5
            bias = module.bias_name
            keeps[block.index] = selected(block.keep["heads"], tuple(range(described.modules[-1].units)))
            changed[block.index] = {bias: block.changed[bias]}


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
@pytest.mark.parametrize("name", ["wanda-sp", "flap", "uniform-obc", "optipfair", "optipfair-calibrated"])
def test_peers_have_the_requested_size(checkpoint_folder, name, sparsity):
    if name.startswith("optipfair"):
        pytest.importorskip("optipfair")
    stream, rows = BlockStream(open_checkpoint(checkpoint_folder("llama"))), Rows.of(token_rows(8, 20, seed=3))
    peer = peers.PEERS[name](stream, rows, sparsity)
    left = peer.kept_parameters / sum(block.parameters for block in stream.blocks)
    # A channel is under half a percent of a block; FLAP's groups are five, and its biases another half.
    assert left == pytest.approx(1 - sparsity, abs=0.03 if name == "flap" else 0.005)
    assert peer.kept_parameters == sum(p.numel() for layer in layers_of(peer.network) for p in layer.parameters())
    logits = logits_of(peer.network, rows.groups[0])
    assert logits.isfinite().all()
    assert relative(logits, logits_of(build("llama"), rows.groups[0])) > 0.01
    assert peer.note
