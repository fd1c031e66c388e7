"""Criteria against their formulas, and the orders of removal that follow from scores."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models import blocks_of, build, layers_of, seen, token_rows
from secateur.criteria.choice import CRITERIA
from secateur.criteria.order import error_curve, remaining_units, removal_order
from secateur.criteria.registry import Criteria, Criterion, all_criteria
from secateur.criteria.statistics import Statistics
from secateur.model.structure import PrunableModule
from secateur.model.surgery import output_weight
from secateur.model.units.heads import HEADS_PER_GROUP, KV_GROUPS
from secateur.numerics.elimination import eliminate
from secateur.numerics.moments import Moments

MODELS = ["llama", "llama biased", "qwen2", "phi3", "gpt2", "opt", "gpt_neox", "mistral"]


def statistics(name: str, kind: str, *, index: int = 1, seed: int = 0) -> tuple[Statistics, Tensor, Tensor, Any]:
    """Statistics of one module of a tiny model, its inputs, its level-2 inputs, and the model."""
    model = build(name, attn_implementation="eager")
    module, tensors = blocks_of(model)[index].module(kind), dict(layers_of(model)[index].named_parameters())
    x, inner = (seen(model, index, path, token_rows(6))[0] for path in (module.input_layer, module.output_layer))
    moments, inputs = Moments(inner.shape[1]), Moments(x.shape[1])
    for part in range(0, len(x), 50):
        moments.update(inner[part : part + 50])
        inputs.update(x[part : part + 50])
    weight = output_weight(module, tensors)
    stats = Statistics(module, tensors, weight, moments, inputs, 0.3, target_is_old_output=True, seed=seed)
    return stats, x, inner, model


def ready(name: str, module: PrunableModule) -> Criterion:
    """A criterion of one module, made ready; scores from gradients, which test_gradients.py has, are made up."""
    given = torch.rand(module.units, generator=torch.Generator().manual_seed(1)).double()
    return Criteria(name, {(1, module.kind): given}).of_module(1, module.kind)


def scores_of(name: str, stats: Statistics) -> Tensor:
    found = all_criteria()[name].score
    return found(stats)


def assert_scores(found: Tensor, wanted: list[float] | Tensor) -> None:
    torch.testing.assert_close(found.double(), torch.as_tensor(wanted, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["llama biased", "gpt2", "phi3"])
def test_second_moment_of_channels(name):
    """Gated and ungated with biases; Phi-3 stores the rows of gate and up in one tensor."""
    stats, x, _, _ = statistics(name, "channels")
    w, x = {path.removeprefix("mlp."): value.double() for path, value in stats.tensors.items()}, x.double()
    if name == "gpt2":
        down, rows = w["c_proj.weight"].T, [x @ w["c_fc.weight"] + w["c_fc.bias"]]
    elif name == "phi3":
        down, rows = w["down_proj.weight"], [x @ part.T for part in w["gate_up_proj.weight"].chunk(2)]
    else:
        down = w["down_proj.weight"]
        rows = [x @ w[f"{part}_proj.weight"].T + w[f"{part}_proj.bias"] for part in ("up", "gate")]
    wanted = torch.ones(stats.module.units, dtype=torch.float64)
    for part in rows:
        wanted *= 0.5 * down.square().sum(0) * part.square().mean(0)
    assert_scores(scores_of("second-moment", stats), wanted)


@pytest.mark.parametrize("name", ["llama biased", "qwen2", "mistral"])
def test_second_moment_of_attention_folds_the_probabilities_in(name):
    stats, x, _, model = statistics(name, "heads")
    ids, w, module = token_rows(6), stats.tensors, stats.module
    with torch.no_grad():
        probabilities = model(ids, use_cache=False, output_attentions=True).attentions[1].double()
    x = x.view(*ids.shape, -1).double()
    values, output = w["self_attn.v_proj.weight"].double(), w["self_attn.o_proj.weight"].double()
    bias = w["self_attn.v_proj.bias"].double() if "self_attn.v_proj.bias" in w else torch.zeros(len(values))
    wanted = []
    for head in range(module.units):
        # X^ = P X; every row of P sums to one, so that the bias passes through as it is.
        folded = probabilities[:, head] @ x
        rows, columns = (torch.arange(module.size) + at * module.size for at in (head // module.per_group, head))
        squares = (folded @ values[rows].T + bias[rows]).square().mean((0, 1))
        wanted.append(float((0.5 * output[:, columns].square().sum(0) * squares).sum()))
    assert_scores(scores_of("second-moment", stats), wanted)


@pytest.mark.parametrize("kind", ["heads", "channels"])
@pytest.mark.parametrize("name", MODELS)
def test_wanda_equals_its_formula(name, kind):
    stats, _, inner, _ = statistics(name, kind)
    entries = stats.weight_ao.double().abs().sum(1) * inner.double().square().mean(0).sqrt()
    assert_scores(scores_of("wanda", stats), entries.view(stats.module.units, -1).sum(1))


def unit_weights(stats: Statistics, unit: int) -> list[tuple[Tensor, float]]:
    """All weights of a unit by architecture, spelled out, each with its share."""
    module, w, size = stats.module, stats.tensors, stats.module.size
    here = slice(unit * size, (unit + 1) * size)
    if "mlp.c_fc.weight" in w:
        if module.kind == "channels":
            return [(w["mlp.c_fc.weight"][:, here], 1.0), (w["mlp.c_proj.weight"][here], 1.0)]
        fused = w["attn.c_attn.weight"].view(48, 3, 6, size)
        return [(fused[:, :, unit], 1.0), (w["attn.c_proj.weight"][here], 1.0)]
    if module.kind == "channels":
        parts = [(w[f"mlp.{name}_proj.weight"][here], 1.0) for name in ("up", "gate")]
        return [*parts, (w["mlp.down_proj.weight"][:, here], 1.0)]
    group = unit // module.per_group
    shared = slice(group * size, (group + 1) * size)
    q, k, v = (w[f"self_attn.{name}_proj.weight"] for name in "qkv")
    share = 1 / module.per_group
    return [(q[here], 1.0), (k[shared], share), (v[shared], share), (w["self_attn.o_proj.weight"][:, here], 1.0)]


@pytest.mark.parametrize("kind", ["heads", "channels"])
@pytest.mark.parametrize("name", ["llama biased", "qwen2", "gpt2"])
@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_magnitudes_equal_their_formulas(criterion, name, kind):
    stats, _, _, _ = statistics(name, kind)
    power = {"l1": 1, "l2": 2}[criterion]
    wanted = [
        sum(share * float(part.double().abs().pow(power).sum()) for part, share in unit_weights(stats, unit))
        for unit in range(stats.module.units)
    ]
    assert_scores(scores_of(criterion, stats), torch.tensor(wanted) ** (1 / power))


SEVENS = [float(7 * unit % 72) for unit in range(72)]


@pytest.mark.parametrize(
    ("name", "axis", "scores", "order", "remaining"),
    [
        ("llama", "channels", SEVENS, [0, 31], tuple(unit for unit in range(72) if SEVENS[unit] > 1)),
        # Equal scores leave in order.
        ("llama", "channels", [1.0] * 72, [*range(12)], tuple(range(12, 72))),
        # Groups by the sum of their heads, of which there are six in three groups.
        ("llama", KV_GROUPS, [0.0, 9.0, 6.0, 6.0, 5.0, 5.0], [0, 2], (2, 3)),
        ("llama", KV_GROUPS, [0.0, 9.0, 6.0, 6.0, 5.0, 5.0], [0], (2, 3, 4, 5)),
        # One head of every group in a round, whatever the sum of the group.
        ("llama", HEADS_PER_GROUP, [0.0, 9.0, 4.0, 3.0, 8.0, 7.0], [0, 3, 5], (1, 2, 4)),
        ("qwen2", HEADS_PER_GROUP, [3.0, 1.0, 2.0, 7.0, 9.0, 8.0], [1, 3, 2, 5], (0, 4)),
        ("qwen2", HEADS_PER_GROUP, [3.0, 1.0, 2.0, 7.0, 9.0, 8.0], [1, 3], (0, 2, 4, 5)),
    ],
)
def test_units_are_removed_by_ascending_score(name, axis, scores, order, remaining):
    stats = statistics(name, "channels" if axis == "channels" else "heads")[0]
    fixed = Criterion(score=lambda _: torch.tensor(scores, dtype=torch.float64))
    a_round = stats.module.groups if axis == HEADS_PER_GROUP else 1
    found = removal_order(fixed, stats, axis, stats.module.axis(axis).units - len(order) // a_round)
    assert found.tolist() == order
    assert remaining_units(stats.module, axis, found) == remaining


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_every_width_along_every_axis_can_be_reached(criterion, name):
    for kind in ("heads", "channels"):
        stats, _, inner, _ = statistics(name, kind)
        module, before = stats.module, {path: tensor.clone() for path, tensor in stats.tensors.items()}
        found = ready(criterion, module)
        for axis in [one.name for one in module.cut_axes]:
            units = module.axis(axis).units
            a_round = module.groups if axis == HEADS_PER_GROUP else 1
            for stop in {1, max(1, units - 1)}:
                order = removal_order(found, stats, axis, stop)
                assert len(order) == (units - stop) * a_round
                kept = remaining_units(module, axis, order)
                each = {KV_GROUPS: module.per_group, HEADS_PER_GROUP: module.groups, "channels": 1}[axis]
                assert len(kept) == stop * each
            curve = error_curve(found, stats, axis)
            assert len(curve.errors) == (units - 1) * a_round + 1
            assert torch.equal(curve.order, removal_order(found, stats, axis, 1))
            # The dense module has no error, and removing all of it loses its whole energy.
            energy = float((inner.double() @ stats.weight_ao.double()).square().sum())
            assert abs(float(curve.errors[0])) < 1e-4 * energy
            assert 0 < float(curve.errors[-1]) < energy
            assert float(curve.errors.diff().min()) > -1e-3 * energy
        assert all(torch.equal(stats.tensors[path], tensor) for path, tensor in before.items())


def test_surgeon_equals_elimination():
    stats, _, inner, _ = statistics("llama", "heads")
    assert stats.module.size == 8
    found = error_curve(all_criteria()["surgeon"], stats, KV_GROUPS)
    expected = eliminate(stats.normal, 16)
    assert torch.equal(found.order, expected.order)
    assert torch.equal(found.errors, expected.errors)
    target = inner.double() @ stats.weight_ao.double()
    kept = [entry for entry in range(48) if entry // 16 not in found.order[:1].tolist()]
    # At most what dropping the group without a refit costs.
    plain = inner.double()[:, kept] @ stats.weight_ao.double()[kept]
    assert float(found.errors[1]) < float((plain - target).square().sum())


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_heads_that_are_removed_first_leave_the_order_of_the_others(name):
    for index in range(3):
        stats, surgeon = statistics(name, "heads", index=index)[0], all_criteria()["surgeon"]
        order = removal_order(surgeon, stats, KV_GROUPS, 1)
        heads = frozenset(head for head in range(stats.module.units) if head // stats.module.per_group == order[0])
        assert torch.equal(removal_order(replace(surgeon, removed_first=heads), stats, KV_GROUPS, 1), order)
