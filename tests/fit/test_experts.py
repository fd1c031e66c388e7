"""Mixtures of experts: routes of tokens, the order of removal, and the refit of the remaining experts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import CheckpointFolder
from models import MIXTURES, blocks_of, build, layers_of, seen, token_rows
from secateur.checkpoints.checkpoint import open_checkpoint
from secateur.checkpoints.expert_matrices import whole
from secateur.criteria import experts
from secateur.criteria.choice import parse_choice
from secateur.criteria.experts import expert_order
from secateur.criteria.routed_tokens import RoutedTokens
from secateur.fit.loop import refit
from secateur.fit.mixture import MIN_TOKENS
from secateur.fit.output_projection import OutputFit
from secateur.fit.recovery import Method, Recovery, recovery_of
from secateur.model.mixture import Mixture, Routes
from secateur.model.stream import BlockStream
from secateur.model.surgery import assign, entries, tensors_of
from secateur.model.units.experts import EXPERT_CHANNELS, EXPERTS
from secateur.plan.problem import Plan
from secateur.survey.expert_refit import leave_one_out_residuals
from secateur.survey.mixture_estimator import channel_errors

TOKENS = 60


@contextmanager
def mixture_of(folder: CheckpointFolder, name: str, index: int = 2) -> Iterator[tuple[Mixture, nn.Module]]:
    """The mixture of one filled block, and the block."""
    stream = BlockStream(open_checkpoint(folder(name)))
    with stream.filled(index) as layer, torch.no_grad():
        yield Mixture(stream, layer, stream.blocks[index].modules[-1]), layer


def inputs(width: int, tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(3))


def routed_of(mixture: Mixture, tokens: int = TOKENS) -> RoutedTokens:
    x = inputs(mixture.stream.width, tokens)
    weight = torch.linspace(0.5, 1.5, tokens)
    return RoutedTokens(mixture, x, mixture.output(x[None], mixture.all_routed)[0], weight, lambda y, _: y)


def sum_of_experts(mixture: Mixture, x: Tensor, routes: Routes) -> Tensor:
    """The output of the shared expert, and of each expert on the tokens that are routed to it, times their gates."""
    total = torch.zeros_like(x) if mixture.shared is None else mixture.shared_output(x)
    for expert in routes.experts.unique().tolist():
        tokens, gates = routes.of(expert)
        total[tokens] += gates[:, None] * mixture.ungated_output(expert, x[tokens])
    return total


@pytest.mark.parametrize("name", MIXTURES)
def test_gated_expert_outputs_add_up_to_the_mixture(checkpoint_folder, name):
    """No token is routed to a removed expert, and afterwards nothing has changed."""
    with mixture_of(checkpoint_folder, name) as (mixture, layer):
        x, module, near = inputs(mixture.stream.width), mixture.module, {"rtol": 1e-4, "atol": 1e-5}
        before = {key: whole(value).clone() for key, value in tensors_of(layer).items()}
        routes, dense = mixture.route(x, mixture.all_routed), mixture.output(x[None], mixture.all_routed)
        torch.testing.assert_close(sum_of_experts(mixture, x, routes), dense[0], **near)
        if not module.outer_norm:
            own = mixture.parent(x[None])
            torch.testing.assert_close((own[0] if isinstance(own, tuple) else own).view_as(dense), dense, **near)
        if mixture.shared is not None:
            first, *others = mixture.with_shared(mixture.all_routed)
            assert others == mixture.all_routed.tolist()
            tokens, rows = mixture.gated_input(first, x, routes)
            assert tokens.tolist() == list(range(TOKENS))
            bias = 0 if mixture[first].bias is None else mixture[first].bias
            torch.testing.assert_close(rows @ mixture[first].weight + bias, mixture.shared_output(x), **near)
        alive = torch.tensor([unit for unit in range(module.units) if unit % module.per_group])
        routes, found = mixture.route(x, alive), mixture.output(x[None], alive)[0]
        assert set(routes.experts.unique().tolist()) <= set(alive.tolist())
        torch.testing.assert_close(found, sum_of_experts(mixture, x, routes), **near)
        assert not torch.allclose(found, dense[0], atol=1e-3)
        assert torch.equal(mixture.output(x[None], mixture.all_routed), dense)
        assert all(torch.equal(whole(value), before[key]) for key, value in tensors_of(layer).items())


def error_without(mixture: Mixture, routed: RoutedTokens, removed: list[int]) -> float:
    """Return the error without some experts, by the model's own forward pass."""
    alive = torch.tensor([unit for unit in range(mixture.module.units) if unit not in removed])
    found = mixture.output(routed.x_nd[None], alive)[0]
    shared = mixture.shared_output(routed.x_nd)
    found = found if shared is None else found - shared
    return float(((found - routed.target_nd).square().sum(1) * routed.weight_n).sum())


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "minimax_m2", "qwen3_moe", "llama4_text"])
def test_reroute_removes_the_expert_with_the_least_error(checkpoint_folder, name):
    with mixture_of(checkpoint_folder, name) as (mixture, _):
        routed, module = routed_of(mixture), mixture.module
        found = expert_order("reroute", routed, module.min_units)
        assert len(found.order) == module.units - module.min_units == len(found.errors) - 1
        for place, expert in enumerate(found.order):
            removed = found.order[:place]
            errors = {u: error_without(mixture, routed, [*removed, u]) for u in range(module.units) if u not in removed}
            # Gates over all experts change a little where none of theirs goes, and that is left out.
            assert errors[expert] <= 1.02 * min(errors.values())
            assert found.errors[place + 1] == pytest.approx(errors[expert], rel=1e-4)


@pytest.mark.parametrize("name", ["qwen2_moe", "glm4_moe groups"])
def test_errors_are_interpolated_within_a_round(checkpoint_folder, monkeypatch, name):
    """Half of the experts are removed per round, equally many from each group."""
    with mixture_of(checkpoint_folder, name) as (mixture, _):
        routed, groups = routed_of(mixture), mixture.module.groups
        found = expert_order("frequency", routed, mixture.module.min_units)
        monkeypatch.setattr(experts, "ROUNDS", 2)
        quick = expert_order("frequency", routed, mixture.module.min_units)
        assert quick.order == found.order
        assert [quick.errors[end] for end in (0, -1)] == pytest.approx([found.errors[end] for end in (0, -1)])
        step = min(mixture.module.units // 2, len(found.order)) // groups * groups
        first = torch.tensor(quick.errors[: step + 1])
        assert step > 1
        assert first[-1] == pytest.approx(found.errors[step])
        torch.testing.assert_close(first.diff(), ((first[-1] - first[0]) / step).expand(step), rtol=1e-3, atol=1e-5)


def test_expert_scores_equal_their_formulas(checkpoint_folder):
    with mixture_of(checkpoint_folder, "qwen2_moe") as (mixture, _):
        routed = routed_of(mixture)
        gates, chosen = (routed.x_nd @ mixture.router.weight.T).softmax(1).topk(3)
        scores, counts = [], []
        for expert in range(8):
            norms = torch.linalg.vector_norm(mixture.ungated_output(expert, routed.x_nd), dim=1)
            counts.append(float(routed.weight_n[(chosen == expert).any(1)].sum()))
            scores.append(float(routed.weight_n @ ((gates * (chosen == expert)).sum(1) * norms)) / counts[-1])
        for name, wanted in (("reap", scores), ("frequency", counts)):
            found = expert_order(name, routed, 3)
            assert found.order == tuple(sorted(range(8), key=wanted.__getitem__)[:5])
            assert parse_choice(name).experts == name
            assert parse_choice(f"experts={name},heads=l1, channels=l2").experts == name
        assert expert_order("random", routed, 3, seed=1) != expert_order("random", routed, 3, seed=2)


ROWS = token_rows(24, 16, seed=5)


def fitted(folder: Any, experts: int, channels: int | None = None, criterion: str = "surgeon", **recovery: Any) -> Any:
    """Return block 2 fitted with a number of experts, and a number of channels of each."""
    rows, stream = recovery.pop("rows", ROWS), BlockStream(open_checkpoint(folder))
    dense = stream.blocks[2].width
    width = dense | {EXPERTS: experts, EXPERT_CHANNELS: channels or dense.channels}
    method = Method(criterion, recovery_of(**recovery))
    (block,) = refit(stream, Plan({2: width}, 0, 0), rows, method=method)
    return block


def channels_of(block: Any, inner: int) -> dict[int, list[int]]:
    every = [(unit // inner, unit % inner) for unit in block.keep["channels"]]
    return {expert: [one for owner, one in every if owner == expert] for expert in block.keep["experts"]}


def first_to_leave(hessian: Tensor, right: Tensor, count: int) -> list[int]:
    """Greedily, whatever raises the least penalised error: every candidate solved for anew."""
    alive = list(range(len(hessian)))

    def gain(units: list[int]) -> float:
        return float((right[units] * torch.linalg.solve(hessian[units][:, units], right[units])).sum())

    for _ in range(count):
        alive.remove(max(alive, key=lambda unit: gain([one for one in alive if one != unit])))
    return alive


@pytest.mark.parametrize("channels", [20, 8])
def test_the_refit_of_experts_is_least_squares(checkpoint_folder, channels):
    """Each expert in turn, in float64: kept channels regressed on target minus output of the others."""
    name, ridge = "qwen2_moe", 0.3
    block = fitted(checkpoint_folder(name), 5, channels, ridge=ridge, input_steps=0)
    stay = channels_of(block, 20) if channels < 20 else {}
    assert ("channels" in block.keep) == (channels < 20)
    model, keep = build(name), list(block.keep["experts"])
    x, wanted = seen(model, 2, "mlp", ROWS)
    mlp: Any = layers_of(model)[2].get_submodule("mlp")
    with torch.no_grad():
        gates, chosen = (x @ mlp.gate.weight[keep].T).softmax(1).topk(3)
        x, wanted, gates = x.double(), wanted.double(), gates.double()
        new = {key.removeprefix("mlp."): whole(value) for key, value in block.changed.items()}
        tensors = {key: value.double() for key, value in mlp.state_dict().items()}
        always = torch.sigmoid(x @ tensors["shared_expert_gate.weight"].T)
        silu = nn.functional.silu
        gate, up = (x @ tensors[f"shared_expert.{one}_proj.weight"].T for one in ("gate", "up"))
        rows = {-1: always * silu(gate) * up}
        weights = {-1: tensors["shared_expert.down_proj.weight"].T}
        for place, expert in enumerate(keep):
            gate, up = (x @ tensors["experts.gate_up_proj"][expert].T).chunk(2, 1)
            rows[expert] = (gates * (chosen == place)).sum(1)[:, None] * silu(gate) * up
            weights[expert] = tensors["experts.down_proj"][expert].T
        left = wanted - sum(rows[one] @ weights[one] for one in rows)
        for one, part in rows.items():
            routed_count = int(part.abs().sum(1).count_nonzero())
            assert routed_count >= MIN_TOKENS
            hessian = part.T @ part
            penalty = ridge * (1 + part.shape[1] / routed_count) * hessian.diagonal().diag()
            right = part.T @ (left + part @ weights[one]) + penalty @ weights[one]
            units = stay.get(one, list(range(part.shape[1])))
            if one >= 0 and stay:
                assert units == first_to_leave(hessian + penalty, right, 20 - channels)
            solved = torch.zeros_like(right)
            solved[units] = torch.linalg.solve((hessian + penalty)[units][:, units], right[units])
            found = new["shared_expert.down_proj.weight"] if one < 0 else new["experts.down_proj"][one]
            torch.testing.assert_close(found.double().T, solved, rtol=1e-3, atol=1e-4)
            left += part @ (weights[one] - solved)
    error = float(left.square().sum(1).mean())
    assert block.reports[1].error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("name", ["hunyuan_v1_moe", "deepseek_v3", "ernie4_5_moe"])
def test_the_shared_expert_is_narrowed_with_the_others(checkpoint_folder, name):
    """If its width follows from theirs, its channels are chosen and refitted first; against float64."""
    ridge, experts = 0.3, blocks_of(build(name))[2].modules[-1].units
    block = fitted(checkpoint_folder(name), experts, 8, ridge=ridge)
    with mixture_of(checkpoint_folder, name) as (mixture, _):
        module = mixture.module
        rows = mixture.projection_input(module.units, seen(build(name), 2, module.path, ROWS)[0]).double()
        old = mixture[module.units].weight.double()
    stay = 8 * module.shared_multiple
    assert len(old) == module.shared_multiple * module.units_inside
    kept = [unit - module.units * module.units_inside for unit in block.keep["channels"][-stay:]]
    hessian = rows.T @ rows
    penalty = ridge * (1 + len(old) / len(rows)) * hessian.diagonal().diag()
    right = (hessian + penalty) @ old
    assert kept == first_to_leave(hessian + penalty, right, len(old) - stay)
    solved = torch.zeros_like(old)
    solved[kept] = torch.linalg.solve((hessian + penalty)[kept][:, kept], right[kept])
    found = next(value for key, value in block.changed.items() if "shared" in key)
    torch.testing.assert_close(found.double().T, solved, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MIXTURES)
def test_slopes_equal_finite_differences(checkpoint_folder, name):
    with mixture_of(checkpoint_folder, name) as (mixture, _):
        x, dice, expert = inputs(mixture.stream.width), torch.Generator().manual_seed(1), 2
        own, matrix = mixture[expert].module, mixture.experts.gate_up_proj.read(expert)
        source, before = mixture.expert_input(expert, x), mixture.projection_input(expert, x)
        expected = torch.zeros_like(before)
        for slab, slope in zip(own.channel_projections, mixture[expert].slopes(source), strict=True):
            rows = entries(slab, range(own.units))
            value = matrix.movedim(slab.axis, 0)[rows]
            change = 1e-3 * value.std() * torch.randn(value.shape, generator=dice)
            expected += slope * (source @ change.T)
            # The block keeps this matrix in memory.
            matrix.movedim(slab.axis, 0)[rows] += change
        found = mixture.projection_input(expert, x) - before
        assert torch.linalg.vector_norm(found - expected) < 0.01 * torch.linalg.vector_norm(found)


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_input_projections_of_experts_reduce_the_error(checkpoint_folder, name):
    """The reported error equals the error of the block with the new weights, and is smaller than without the step."""
    folder, experts = checkpoint_folder(name), blocks_of(build(name))[2].modules[-1].units - 2
    plain, block = (fitted(folder, experts, input_steps=steps) for steps in (0, 2))
    assert block.keep == plain.keep
    assert block.reports[1].error < 0.95 * plain.reports[1].error
    assert {key.rpartition(".")[2] for key in set(block.changed) - set(plain.changed)} == {"gate_up_proj"}
    with mixture_of(checkpoint_folder, name) as (mixture, layer):
        x = seen(build(name), 2, mixture.module.output_layer, ROWS)[0][None]
        wanted = mixture.output(x, mixture.all_routed)[0]
        for key, value in block.changed.items():
            assign(layer, key, value)
        found = mixture.output(x, torch.tensor(block.keep["experts"]))[0]
    error = float((found - wanted).square().sum(1).mean())
    assert block.reports[1].error == pytest.approx(error, rel=1e-3)


DISTINCT = ("mixtral", "qwen2_moe", "gpt_oss", "llama4_text", "deepseek_v3", "gemma4_text mixture")
"""Models for every way to store experts, to name their number and to have a shared one."""


@pytest.mark.parametrize("channels", [None, 8])
@pytest.mark.parametrize("name", DISTINCT)
def test_the_refit_of_experts_reduces_the_error(checkpoint_folder, name, channels):
    """Fewer experts, or fewer channels of each."""
    module = blocks_of(build(name))[2].modules[-1]
    stay = module.units if channels else max(module.min_units, module.units * 3 // 4)
    plain, block = (fitted(checkpoint_folder(name), stay, channels, method=method) for method in ("none", "refit"))
    assert block.reports[1].error < 0.95 * plain.reports[1].error
    for one in (plain, block) if channels else ():
        assert {len(units) for units in channels_of(one, module.units_inside).values()} == {channels}


@dataclass(frozen=True)
class Halved(Recovery):
    """A recovery that divides the weights of kept units by two."""

    fits = True

    def fit(self, module_fit: Any) -> OutputFit:
        old = module_fit.solve(module_fit.without_refit)
        return old._replace(weight_kd=old.weight_kd / 2)


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_the_fit_of_any_recovery_runs_on_experts(checkpoint_folder, name):
    stream = BlockStream(open_checkpoint(checkpoint_folder(name)))
    (block,) = refit(stream, Plan({2: stream.blocks[2].width}, 0, 0), ROWS, method=Method("surgeon", Halved()))
    module, dense = stream.blocks[2].modules[-1], stream.block_tensors(2)
    kept = [expert for expert in range(module.units) if expert not in block.reports[1].unfitted]
    down = module.output_projection.name
    assert kept
    assert torch.equal(whole(block.changed[down])[kept], whole(dense[down])[kept] / 2)
    shared = [name for name in block.changed if "shared_expert.down_proj" in name]
    assert all(torch.equal(block.changed[name], dense[name] / 2) for name in shared)
    assert len(shared) == (name == "qwen2_moe")


@pytest.mark.parametrize("criterion", ["wanda", "flap-wifv", "second-moment", "l2", "random", "llm-pruner-vector"])
def test_every_criterion_orders_the_channels_of_experts(checkpoint_folder, criterion):
    """Each expert has its own statistics. The default replaces a criterion that needs gradients."""
    folder = checkpoint_folder("gpt_oss")
    found, default = (fitted(folder, 8, 24, name, method="none") for name in (criterion, "surgeon"))
    same = found.keep.get("channels") == default.keep.get("channels")
    assert same == criterion.startswith("llm-pruner")
    if criterion == "l2":
        with mixture_of(lambda _: folder, "gpt_oss") as (mixture, _):
            up, down = whole(mixture.experts.gate_up_proj), whole(mixture.experts.down_proj)
            squares = up.square().sum(1).view(8, -1, 2).sum(2) + down.square().sum(2)
        for expert, units in channels_of(found, 72).items():
            assert units == sorted(squares[expert].argsort(descending=True)[:24].tolist())


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_the_error_curve_of_channels_equals_the_output_error(checkpoint_folder, name):
    with mixture_of(checkpoint_folder, name) as (mixture, _):
        routed, inner = routed_of(mixture), mixture.module.units_inside
        errors, orders = channel_errors(routed)
        assert len(errors) == inner
        assert errors[0] == 0
        every, dense = mixture.all_routed, mixture.output(routed.x_nd[None], mixture.all_routed)[0]
        routes, removed, multiple = mixture.route(routed.x_nd, every), round(inner / 2), mixture.module.shared_multiple
        assert set(orders) == {*every.tolist(), *([mixture.module.units] if multiple else [])}
        for expert in orders:
            tokens, rows = mixture.gated_input(expert, routed.x_nd, routes)
            energy = (routed.weight_n[tokens][:, None] * rows.square()).sum(0) * mixture[expert].weight.square().sum(1)
            gone = energy.argsort()[: len(energy) * removed // inner]
            mixture[expert].weight.data[gone] = 0
        lost = mixture.output(routed.x_nd[None], every)[0] - dense
        assert errors[removed] == pytest.approx(float((lost.square().sum(1) * routed.weight_n).sum()), rel=1e-3)
        assert list(errors) == sorted(errors)


@pytest.mark.parametrize(("rows", "inputs_"), [(30, 7), (7, 30), (12, 12)])
def test_left_out_residuals_equal_fits_without_the_row(rows, inputs_):
    """The reference is one float64 fit per row, with the penalty of all rows."""
    dice = torch.Generator().manual_seed(1)
    x, r = (torch.randn(rows, size, generator=dice, dtype=torch.float64) for size in (inputs_, 5))
    x[:, 2] = 0
    penalty = (0.3 * x.square().sum(0) + 1e-12).diag()
    wanted = []
    for row in range(rows):
        others = [one for one in range(rows) if one != row]
        solved = torch.linalg.solve(x[others].T @ x[others] + penalty, x[others].T @ r[others])
        wanted.append(r[row] - x[row] @ solved)
    torch.testing.assert_close(
        leave_one_out_residuals(x.float(), r.float(), 0.3).double(), torch.stack(wanted), rtol=1e-4, atol=1e-4
    )
    assert torch.isfinite(leave_one_out_residuals(x.float(), r.float(), 0.0)).all()
