"""Surveys equal plain sums over one run of the whole model in float64; divergences of probes are nearly exact."""

import copy
import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import ROWS, blocks_of, dense, layers_of, logits_of, masked, opened, reading, seen, selected, token_rows
from outputs import edited_weights, error_of
from secateur.criteria.order import remaining_units, removal_order
from secateur.criteria.registry import SCORED_KINDS, all_criteria
from secateur.criteria.statistics import Statistics
from secateur.model.rows import Rows
from secateur.model.structure import KeptUnits
from secateur.model.surgery import assign, kept_inputs, output_tensor, output_weight
from secateur.model.units.channels import CHANNELS
from secateur.model.units.heads import HEADS
from secateur.numerics.moments import Moments
from secateur.survey import gram_estimator
from secateur.survey.curves import ErrorCurve, Probe, Survey, load_survey, save_survey
from secateur.survey.probes import DRAWN_TOKENS, LIKELY_TOKENS, POSITION_STRIDE, divergences, sampled_tokens
from secateur.survey.survey import survey

RIDGE = 0.3
FITTED = Rows((token_rows(4, 24), token_rows(3, 17, seed=1)), (1.0, 0.25))
PROBES = token_rows(2, 24, seed=9)
CASES: list[tuple[str, str]] = [
    ("llama", "heads"),
    ("llama", "channels"),
    ("gpt2", "channels"),
    ("qwen2", "heads"),
    ("gemma2", "heads"),
    ("gemma2", "channels"),
    ("gpt_neox", "heads"),
]
INDEX = 1
"""Index of the block that is tested."""


class Plain:
    """Least-squares fit of one module, with rows and targets of all tokens at once."""

    def __init__(self, name: str, kind: str):
        model = dense(name)
        self.layer, self.module = layers_of(model)[INDEX], blocks_of(model)[INDEX].module(kind)
        self.tensors = dict(self.layer.named_parameters())
        self.gain = self.read = torch.ones(1, dtype=torch.float64)
        if self.module.post_norm:
            self.read = reading(model, INDEX, kind)
        rows = []
        for ids, weight in zip(FITTED.groups, FITTED.weights, strict=True):
            x, z = (one.double() for one in seen(model, INDEX, self.module.output_layer, ids))
            after = seen(model, INDEX, "", ids)[1].double()
            if self.module.post_norm:
                norm = self.layer.get_submodule(self.module.post_norm)
                # Gemma adds one to what it stores.
                self.gain = (1 + norm.weight.double()) * self.read
                x = x / (z.square().mean(1, keepdim=True) + norm.eps).sqrt()
            rows.append(weight**0.5 * x / (after * self.read).norm(dim=1, keepdim=True))
        self.x = torch.cat(rows)
        self.tokens = sum(weight * ids.numel() for ids, weight in zip(FITTED.groups, FITTED.weights, strict=True))
        self.old = output_weight(self.module, self.tensors).double() * self.gain
        self.target = self.x @ self.old

    def refitted(self, kept: Tensor) -> Tensor:
        """The weights of the kept entries at the minimum, with a penalty on the distance to the old ones."""
        gram = self.x.T @ self.x
        penalty = RIDGE * gram.diagonal()
        matrix, right = gram + torch.diag(penalty), gram @ self.old + penalty[:, None] * self.old
        return torch.linalg.solve(matrix[kept][:, kept], right[kept])

    def error(self, kept: Tensor) -> float:
        """Mean over tokens of the squared distance to the target, after the refit."""
        off = self.x[:, kept] @ self.refitted(kept) - self.target
        return float(off.square().sum() / self.tokens)

    def kept(self, axis: str, gone: int) -> tuple[int, ...]:
        """Units that `l1` leaves; it looks at weights alone."""
        moments = Moments(self.module.units * self.module.size)
        weight = output_weight(self.module, self.tensors)
        stats = Statistics(self.module, self.tensors, weight, moments, None, RIDGE, target_is_old_output=True, seed=0)
        left, l1 = self.module.axis(axis).units - gone, all_criteria()["l1"]
        return remaining_units(self.module, axis, removal_order(l1, stats, axis, left) if gone else torch.empty(0))


def curve_of(found: Survey, kind: str, axis: str, index: int = INDEX) -> ErrorCurve:
    (curve,) = (c for c in found.curves if (c.block, c.kind, c.axis) == (index, kind, axis))
    return curve


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_curves_are_the_errors_of_refits(checkpoint_folder, name, kind):
    found = survey(opened(checkpoint_folder(name)), FITTED, PROBES, criterion="l1", ridge=RIDGE)
    plain = Plain(name, kind)
    assert found.tokens == 4 * 24 + 3 * 17
    for axis in [one.name for one in plain.module.cut_axes]:
        curve, units = curve_of(found, kind, axis), plain.module.axis(axis).units
        assert len(curve.errors) == units
        assert curve.energy == pytest.approx(float(plain.target.square().sum()) / plain.tokens, rel=1e-4)
        for gone in sorted({0, 1, units // 2, units - 1}):
            wanted = plain.error(kept_inputs(plain.module, plain.kept(axis, gone)))
            assert curve.errors[gone] == pytest.approx(wanted, rel=1e-3, abs=1e-5 * curve.energy), (axis, gone)
        assert 0 < curve.errors[-1] < curve.energy


def divergence(name: str, keeps: dict[int, KeptUnits], changed: Any = None) -> float:
    """Return the KL divergence of the logits at every second position, with removed units masked."""
    model = dense(name) if changed is None else changed
    wanted = logits_of(dense(name), PROBES)[:, POSITION_STRIDE - 1 :: POSITION_STRIDE].double().log_softmax(-1)
    with masked(model, keeps):
        got = logits_of(model, PROBES)[:, POSITION_STRIDE - 1 :: POSITION_STRIDE].double().log_softmax(-1)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


def whole_block(name: str) -> KeptUnits:
    width = blocks_of(dense(name))[INDEX].width
    return selected(range(width.product(HEADS)), range(width[CHANNELS]))


@pytest.mark.parametrize("name", ROWS)
def test_every_module_is_probed_as_a_whole(checkpoint_folder, name):
    """Modules whose single units cannot be removed are probed as well."""
    found = survey(opened(checkpoint_folder(name)), token_rows(3), PROBES, criterion="l1")
    modules = {(index, kind) for index in range(3) for kind in SCORED_KINDS}
    assert {(curve.block, curve.kind) for curve in found.curves} == modules
    whole = {(probe.block, probe.kind): probe for probe in found.probes if probe.removes_module}
    assert whole.keys() == modules
    for (index, kind), probe in whole.items():
        wanted = divergence(name, {index: whole_block(name) | {kind: ()}})
        assert wanted > 1e-4
        assert probe.divergence == pytest.approx(wanted, rel=2e-3, abs=1e-5)
        axis = blocks_of(dense(name))[index].module(kind).cut_axes[0].name
        assert probe.error == curve_of(found, kind, axis, index).energy

    parts = [probe for probe in found.probes if not probe.removes_module]
    locked = blocks_of(dense(name))[0].heads_locked
    assert {probe.kind for probe in parts} == ({"channels"} if locked else set(SCORED_KINDS))
    assert all(0 <= probe.divergence < float("inf") for probe in parts)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_partial_probe_is_the_refitted_model(checkpoint_folder, monkeypatch, name, kind):
    # At this share, the refit of every model shows.
    monkeypatch.setattr(gram_estimator, "PROBED_SHARE", 0.6)
    found = survey(opened(checkpoint_folder(name)), FITTED, PROBES, criterion="l1", ridge=RIDGE)
    plain = Plain(name, kind)
    axis = plain.module.cut_axes[-1].name
    curve, gone = curve_of(found, kind, axis), round(0.6 * plain.module.axis(axis).units)
    (probe,) = [p for p in found.probes if (p.block, p.kind, p.removes_module) == (INDEX, kind, False)]
    assert probe.error == pytest.approx(curve.errors[gone] - curve.errors[0], rel=1e-6)
    kept = plain.kept(axis, gone)
    entries = kept_inputs(plain.module, kept)
    weight = torch.zeros_like(plain.old)
    weight[entries] = plain.refitted(entries)
    changed = copy.deepcopy(dense(name))
    stored = output_tensor(plain.module, (weight / plain.gain).float())
    assign(layers_of(changed)[INDEX], plain.module.output_projection.name, stored)
    keep = whole_block(name) | {kind: kept}
    wanted = divergence(name, {INDEX: keep}, changed)
    assert probe.divergence == pytest.approx(wanted, rel=3e-3, abs=1e-6)
    assert abs(divergence(name, {INDEX: keep}) - wanted) > 0.01 * wanted, "the refit does not show"


def test_a_broken_last_norm_is_an_error(checkpoint_folder, tmp_path):
    folder = shutil.copytree(checkpoint_folder("llama"), tmp_path / "model")
    with edited_weights(folder) as tensors:
        tensors["model.norm.weight"][3] = float("nan")
    message = error_of(survey, opened(folder), FITTED, PROBES)
    assert "NaN or infinite logits: the last norm or the output layer is broken" in message


def test_a_survey_of_some_blocks_and_one_kind(checkpoint_folder):
    stream = opened(checkpoint_folder("llama"))
    whole = survey(stream, FITTED, PROBES)
    part = survey(stream, FITTED, PROBES, blocks=range(1, 2), kinds=("channels",))

    def here(found: tuple[Any, ...]) -> list[Any]:
        return [one for one in found if (one.block, one.kind) == (1, "channels")]

    assert list(part.curves) == here(whole.curves)
    # Streams that run together are summed in another order.
    for one, two in zip(part.probes, here(whole.probes), strict=True):
        assert replace(one, divergence=0.0) == replace(two, divergence=0.0)
        assert one.divergence == pytest.approx(two.divergence, rel=1e-4)


ASKED = {"fingerprint": "abc", "blocks": "0:2", "criterion": "l1", "ridge": 0.3}
SURVEY = Survey(
    "l1",
    0.3,
    64,
    (ErrorCurve(0, "heads", "kv_groups", (0.0, 0.25), 1.0), ErrorCurve(0, "channels", "channels", (1e-9, 0.1), 0.5)),
    (Probe(0, "heads", 1.0, True, 0.7), Probe(0, "channels", 0.1, False, 1 / 3)),
    ASKED,
)


def test_a_survey_survives_its_file(tmp_path):
    save_survey(SURVEY, tmp_path / "survey.json")
    assert load_survey(tmp_path / "survey.json", ASKED) == SURVEY
    assert load_survey(tmp_path / "survey.json", {}) == SURVEY


STORED = json.loads(json.dumps(SURVEY, default=lambda value: vars(value)))
CHANGES: list[dict[str, Any]] = [{"curves": 3}, {"curves": [{"block": 0}]}, {"probes": [1]}, {"colour": "red"}]
WRONG: list[dict[str, Any]] = [
    {"left_after_refit": float("nan")},
    {"kind": ["heads"]},
    {"errors": [True]},
    {"energy": "1"},
]
CHANGES += [{"curves": [STORED["curves"][0] | wrong]} for wrong in WRONG]


@pytest.mark.parametrize("text", ["junk", "[]", "{}", "7", *(json.dumps(STORED | change) for change in CHANGES)])
def test_a_file_that_is_no_survey_is_refused(tmp_path, text):
    (tmp_path / "survey.json").write_text(text)
    message = error_of(load_survey, tmp_path / "survey.json", {})
    assert "not a survey by secateur; name another file, or delete it" in message


def exact(dense: Tensor, other: Tensor) -> Tensor:
    """Return KL(dense || other) of each row (t), float64."""
    p, q = (torch.log_softmax(logits.double(), -1) for logits in (dense, other))
    return (p.exp() * (p - q)).sum(-1)


def estimated(dense: Tensor, others: list[Tensor], seed: int = 0) -> Tensor:
    """Return the divergences that `ProbeStreams.finish` computes from logits (t x v), by position and probe (t x p)."""
    tokens, weights = sampled_tokens(dense, torch.Generator().manual_seed(seed))
    found = []
    for place, (some, counts) in enumerate(zip(tokens, weights, strict=True)):
        found.append(divergences(dense[place, some], torch.stack([o[place, some] for o in others]), counts))
    return torch.stack(found)


def test_a_sure_model_gives_exact_divergences():
    """All probability lies on tokens that are selected anyway, so that the drawn ones have no weight."""
    dense, change = torch.randn(2, 3, 1000, generator=torch.Generator().manual_seed(0))
    dense, other = 1000 * dense, 1000 * dense + change
    torch.testing.assert_close(estimated(dense, [other])[:, 0], exact(dense, other), rtol=1e-3, atol=1e-3)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, LIKELY_TOKENS + DRAWN_TOKENS), st.floats(1e-3, 30), st.floats(1e-4, 20))
def test_a_small_vocabulary_gives_exact_divergences(seed, size, spread, change):
    dice = torch.Generator().manual_seed(seed)
    dense = spread * torch.randn(3, size, generator=dice)
    others = [dense + change * torch.randn(3, size, generator=dice) for _ in range(4)]
    found, wanted = estimated(dense, others), torch.stack([exact(dense, other) for other in others], 1)
    assert (found >= -1e-12).all()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-9 + 1e-5 * change**2)


@pytest.mark.parametrize("spread", [1.0, 4.0], ids=["flat", "peaked"])
def test_a_large_vocabulary_gives_divergences_in_the_same_order(spread):
    """Changes of the logits have all sizes, as those by cuts of modules."""
    dice = torch.Generator().manual_seed(0)
    states, matrix = torch.randn(64, 24, generator=dice), torch.randn(24, 20000, generator=dice) / 24**0.5
    dense = spread * states @ matrix
    sizes = [0.01 * 1.3**step for step in range(24)]
    others = [spread * (states + size * torch.randn(64, 24, generator=dice)) @ matrix for size in sizes]
    found = estimated(dense, others).mean(0)
    wanted = torch.stack([exact(dense, other).mean() for other in others])
    assert torch.equal(found.argsort(), wanted.argsort())
    # What few tokens of either model see is all that two very different distributions have in common.
    near = wanted < 3
    assert near.sum() > 15
    assert ((found / wanted)[near].log().abs() < 0.1).all()
