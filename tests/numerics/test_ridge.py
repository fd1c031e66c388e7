"""Refit against float64 least squares, and elimination against refits from scratch."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.fit.output_projection import fit_output_projection
from secateur.numerics.elimination import eliminate
from secateur.numerics.moments import Moments
from secateur.numerics.ridge import NormalEquations, factorise, least_squares, normal_equations

RIDGES = (0.0, 1e-3, 0.03, 0.3, 1.0)


@dataclass
class Layer:
    """Inputs, targets and old weights of a layer, float64."""

    x: Tensor
    t: Tensor
    old: Tensor

    @property
    def gram(self) -> Tensor:
        return self.x.T @ self.x

    def normal(self, ridge: float, *, old_as_target: bool = False) -> NormalEquations:
        cross = None if old_as_target else self.x.T @ self.t
        return normal_equations(self.gram, cross, float(self.t.square().sum()), self.old, ridge)

    def centred(self) -> "Layer":
        return Layer(self.x - self.x.mean(0), self.t - self.t.mean(0), self.old)

    def minimiser(self, ridge: float, keep: Tensor) -> Tensor:
        """Return least squares over stacked rows: the inputs, and one row per input for the ridge penalty."""
        penalty = (ridge * self.gram.diagonal()[keep]).sqrt()
        rows = torch.cat([self.x[:, keep], torch.diag(penalty)])
        targets = torch.cat([self.t, penalty[:, None] * self.old[keep]])
        return torch.from_numpy(np.linalg.lstsq(rows.numpy(), targets.numpy(), rcond=None)[0])

    def error(self, ridge: float, keep: Tensor) -> float:
        """||XW - T||^2 at the penalised minimum."""
        return self.errors(ridge, keep)[0]

    def errors(self, ridge: float, keep: Tensor) -> tuple[float, float]:
        """Return that, and with the penalty; a removed input is penalised as a weight of zero."""
        weight = torch.zeros_like(self.old)
        weight[keep] = self.minimiser(ridge, keep)
        error = float((self.x @ weight - self.t).square().sum())
        penalty = ridge * (self.gram.diagonal()[:, None] * (weight - self.old).square()).sum()
        return error, error + float(penalty)

    @property
    def energy(self) -> float:
        return float(self.t.square().sum())

    def some(self, kept: set[int]) -> Tensor:
        return torch.tensor(sorted({one % len(self.old) for one in kept}))


def layer(seed: int, n: int, a: int, o: int, *, noise: float = 0.5, spread: float = 1.0, offset: float = 0.0) -> Layer:
    """Correlated inputs of different sizes; targets near what the old weights give."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mix = torch.eye(a, dtype=torch.float64) + 0.4 * draw(a, a) / a**0.5
    x = (draw(n, a) @ mix + offset) * 10 ** (spread * (torch.rand(a, generator=generator).double() - 0.5))
    old = draw(a, o)
    t = x @ old + noise * (x @ draw(a, o)) + noise * draw(n, o)
    return Layer(x, t, old)


@st.composite
def layers(draw: st.DrawFn, least: int = 2, most: int = 14, offset: float = 0.0) -> Layer:
    a = draw(st.integers(least, most))
    n = a + draw(st.integers(3, 40))
    spread = draw(st.sampled_from([0.0, 1.0, 3.0]))
    return layer(draw(st.integers(0, 2**31)), n, a, draw(st.integers(1, 6)), spread=spread, offset=offset)


KEPT = st.sets(st.integers(0, 13), min_size=1)
"""Kept inputs; a layer takes them modulo its own number."""


def assert_near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Assert that both are finite and close, relative to the largest entry."""
    found, wanted = found.double(), wanted.double()
    assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@given(case=layers(), ridge=st.sampled_from(RIDGES), kept=KEPT)
@settings(max_examples=120, deadline=None)
def test_refit_is_least_squares(case, ridge, kept):
    keep = case.some(kept)
    weight, error = least_squares(case.normal(ridge), keep)
    scale = case.gram.diagonal()[keep].sqrt()[:, None]
    assert_near(weight * scale, case.minimiser(ridge, keep) * scale, 2e-4)
    assert error == pytest.approx(case.error(ridge, keep), rel=1e-3, abs=1e-5 * case.energy)


@given(case=layers(offset=2.0), ridge=st.sampled_from((0.03, 0.3, 1.0)), intercept=st.booleans(), kept=KEPT)
@settings(max_examples=100, deadline=None)
def test_an_output_projection_fit_is_least_squares(case, ridge, intercept, kept):
    """Streamed float32 moments are used; the intercept is not penalised."""
    keep = case.some(kept)
    moments = Moments(case.x.shape[1], case.t.shape[1], centre=intercept)
    for x, t in zip(case.x.float().split(5), case.t.float().split(5), strict=True):
        moments.update(x, t)
    normal = normal_equations(moments.gram(), moments.cross(), moments.energy(), case.old.float(), ridge)
    weight, bias, error = fit_output_projection(moments, normal, keep)
    assert (bias is not None) == intercept
    seen = case.centred() if intercept else case
    wanted = seen.minimiser(ridge, keep)
    scale = seen.gram.diagonal()[keep].sqrt()[:, None]
    assert_near(weight * scale, wanted * scale, 1e-3)
    if bias is not None:
        assert_near(bias, case.t.mean(0) - case.x.mean(0)[keep] @ wanted, 5e-3)
    assert error == pytest.approx(seen.error(ridge, keep), rel=1e-3, abs=1e-5 * seen.energy)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("ridge", RIDGES)
def test_inputs_that_are_always_zero_keep_their_weights_and_are_removed_first(ridge, size):
    """Their removal costs nothing, whatever the scale of the data; all inputs may be zero."""
    case, every = layer(3, 40, 6, 3), torch.arange(6)
    case.x[:, [1, 4]] = 0
    case.x *= size
    case.t *= size
    weight, error = least_squares(case.normal(ridge), every)
    alive = torch.tensor([0, 2, 3, 5])
    assert_near(weight[[1, 4]], case.old[[1, 4]], 1e-5)
    assert_near(weight[alive], case.minimiser(ridge, alive), 2e-4)
    assert error == pytest.approx(case.error(ridge, alive), rel=1e-3)
    found = eliminate(case.normal(ridge), 1)
    assert set(found.order[:2].tolist()) == {1, 4}
    assert_near(found.errors[:3], found.errors[:1].expand(3), 1e-4)
    case.x *= 0
    weight, error = least_squares(case.normal(ridge), every)
    assert_near(weight, case.old, 1e-6)
    assert error == pytest.approx(case.energy, rel=1e-5)
    assert eliminate(case.normal(ridge), 1).order.shape == (5,)


@given(seed=st.integers(0, 1000), few=st.booleans(), size=st.sampled_from([1e-3, 1.0, 1e3]), kept=KEPT)
@settings(max_examples=60, deadline=None)
def test_without_a_ridge_the_nearest_solution_is_taken(seed, few, size, kept):
    """Inputs are linearly dependent, or more than the rows; the reference is the float64 pseudo-inverse."""
    case = layer(seed, 5 if few else 60, 12, 3)
    if not few:
        case.x[:, 7] = case.x[:, :6] @ case.old[:6, 0]
        case.x[:, 2] = -2 * case.x[:, 9]
    case.x *= size
    keep = case.some(kept)
    gram = (case.x.float().T @ case.x.float()).double()
    weight, error = least_squares(normal_equations(gram, case.x.T @ case.t, case.energy, case.old, 0.0), keep)
    x, scale = case.x[:, keep], case.gram.diagonal()[keep].sqrt()[:, None]
    # Between these, single precision cannot tell a small singular value from none.
    values = torch.linalg.svdvals(x / scale.T)
    assume(not bool(((values > 1e-5) & (values < 3e-2)).any()))
    inverse = torch.from_numpy(np.linalg.pinv((x / scale.T).numpy(), rcond=1e-6))
    wanted = scale * case.old[keep] + inverse @ (case.t - x @ case.old[keep])
    assert_near(scale * weight, wanted, 1e-3)
    # Rounding of the Gram matrix enters times the weights, of which the old ones may be large where inputs repeat.
    size = case.energy + float(wanted.square().sum())
    assert error == pytest.approx(float((x @ (wanted / scale) - case.t).square().sum()), abs=1e-4 * size)


def positions(units: list[int], size: int) -> Tensor:
    return (torch.tensor(units)[:, None] * size + torch.arange(size)).reshape(-1)


def check(case: Layer, ridge: float, found, size: int, *, tolerance: float = 2e-3) -> None:
    """Every error against a refit from scratch."""
    units = len(case.old) // size
    order = found.order.tolist()
    assert len(set(order)) == len(order) == len(found.errors) - 1
    left = list(range(units))
    slack = 1e-5 * case.energy
    for step, unit in enumerate((None, *order)):
        left = [other for other in left if other != unit]
        error = case.error(ridge, positions(left, size))
        assert float(found.errors[step]) == pytest.approx(error, rel=tolerance, abs=slack), step


def cheapest(case: Layer, ridge: float, left: list[int], size: int, among: list[int]) -> dict[int, float]:
    """Return the cost of removing each of some units, by refits from scratch."""
    whole = case.errors(ridge, positions(left, size))[1]
    return {unit: case.errors(ridge, positions([u for u in left if u != unit], size))[1] - whole for unit in among}


@given(case=layers(least=3), ridge=st.sampled_from((1e-3, 0.03, 0.3, 1.0)))
@settings(max_examples=60, deadline=None)
def test_the_unit_whose_removal_costs_least_is_removed(case, ridge):
    """Costs are those of refits without each unit."""
    found = eliminate(case.normal(ridge), 1)
    check(case, ridge, found, 1)
    left = list(range(len(case.old)))
    for unit in found.order.tolist():
        costs = cheapest(case, ridge, left, 1, left)
        assert costs[unit] <= min(costs.values()) * 1.005 + 1e-5 * case.energy
        left.remove(unit)


@given(seed=st.integers(0, 2**31), size=st.integers(1, 4), groups=st.integers(1, 3), per_group=st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_every_step_removes_the_cheapest_unit_of_each_group(seed, size, groups, per_group):
    units, ridge = groups * per_group, 0.1
    case = layer(seed, units * size + 25, units * size, 4)
    found = eliminate(case.normal(ridge), size, groups=groups)
    assert len(found.order) == units - groups
    check(case, ridge, found, size)
    left = list(range(units))
    for removed in found.order.view(-1, groups).tolist():
        assert [unit // per_group for unit in removed] == list(range(groups))
        # Each is the cheapest of its group, by the costs at the start of the round.
        for group, unit in enumerate(removed):
            costs = cheapest(case, ridge, left, size, [u for u in left if u // per_group == group])
            assert costs[unit] <= min(costs.values()) * 1.005 + 1e-5 * case.energy
        left = [unit for unit in left if unit not in removed]


@pytest.mark.parametrize(("units", "size"), [(64, 1), (100, 1), (160, 1), (70, 2)])
@pytest.mark.parametrize("given_order", [False, True])
def test_several_units_a_step_cost_what_single_removals_cost(units, size, given_order):
    """Wide layers lose two, three or five units at once."""
    case = layer(6, 300, units * size, 8, spread=2.0)
    order = torch.randperm(units, generator=torch.Generator().manual_seed(0)) if given_order else None
    found = eliminate(case.normal(0.3), size, stop=units - 40 // size, order=order)
    assert len(found.order) == 40 // size
    if order is not None:
        assert torch.equal(found.order, order[: 40 // size])
    check(case, 0.3, found, size)


@given(
    seed=st.integers(0, 10**6), size=st.integers(1, 3), ridge=st.sampled_from((0.0, 1.0)), old_as_target=st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_weights_at_a_width_equal_a_refit(seed, size, ridge, old_as_target):
    """Even if the width ends a step early, or an input is always zero."""
    case = layer(seed, 300, 70 * size, 4)
    case.x[:, 3] = 0
    if old_as_target:
        case.t = case.x @ case.old
    normal = case.normal(ridge, old_as_target=old_as_target)
    found = eliminate(normal, size, stop=30, weights_at=[7, 40])
    assert sorted(found.weights) == [7, 40]
    for removed, weight in found.weights.items():
        left = sorted(set(range(70)) - set(found.order[:removed].tolist()))
        wanted, error = least_squares(normal, positions(left, size))
        assert_near(weight, wanted, 2e-3)
        assert float(found.errors[removed]) == pytest.approx(error, rel=2e-3, abs=1e-5 * case.energy)


@pytest.mark.parametrize("seed", range(3))
def test_a_step_is_greedy_among_its_candidates(seed):
    """Ten strongly correlated inputs a step: each removed one is the cheapest of the step's candidates."""
    case, ridge, step = layer(seed, 900, 320, 5), 0.03, 10
    shared = layer(seed + 100, 900, 40, 1).x
    case.x = shared[:, torch.arange(320) % 40] + 0.2 * case.x
    case.t = case.x @ case.old
    found = eliminate(case.normal(ridge), 1, stop=320 - 6 * step)
    left = list(range(320))
    matrix = case.gram + ridge * torch.diag(case.gram.diagonal())
    right = case.x.T @ case.t + ridge * case.gram.diagonal()[:, None] * case.old

    def costs() -> dict[int, float]:
        inverse = torch.linalg.inv(matrix[left][:, left])
        cost = (inverse @ right[left]).square().sum(1) / inverse.diagonal()
        return dict(zip(left, cost.tolist(), strict=True))

    overtaken = 0
    for chosen in found.order.view(-1, step).tolist():
        before = costs()
        pool = sorted(before, key=before.__getitem__)[: 2 * step]
        overtaken += set(chosen) != set(pool[:step])
        for unit in chosen:
            now = costs()
            assert unit in pool
            assert now[unit] <= 1.01 * min(now[candidate] for candidate in pool if candidate in now)
            left.remove(unit)
    assert overtaken >= 3


def test_equations_without_a_solution_and_without_inputs():
    case = layer(1, 40, 6, 3)
    weight, error = least_squares(case.normal(0.3), torch.arange(0))
    assert weight.shape == (0, 3)
    assert error == pytest.approx(case.energy, rel=1e-5)
    case.x[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        least_squares(case.normal(0.3), torch.arange(6))
    with pytest.raises(FloatingPointError, match="not positive definite"):
        factorise(torch.tensor([[1.0, 0.0], [0.0, -5.0]]))
    assert torch.isfinite(factorise(torch.tensor([[1.0, 1.05], [1.05, 1.0]]))).all()
