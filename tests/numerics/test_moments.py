"""Streamed moments against float64 sums over all rows at once, for any split into batches."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.numerics import moments, panels
from secateur.numerics.moments import Moments

TOLERANCE = 2e-5
"""Relative tolerance of float32 sums."""


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and panels that tiny inputs fill several times."""
    monkeypatch.setattr(moments, "CHUNK", 7)
    monkeypatch.setattr(panels, "PANEL", 3)


@dataclass
class Case:
    """Rows, where they are cut into batches, and the weight of each batch."""

    x: Tensor
    t: Tensor
    cuts: list[int]
    weights: list[float]

    def batches(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        edges = [0, *sorted(self.cuts), self.x.shape[0]]
        for start, stop, weight in zip(edges, edges[1:], self.weights, strict=False):
            yield self.x[start:stop], self.t[start:stop], weight

    @property
    def row_weights(self) -> Tensor:
        return torch.cat([torch.full((len(x),), weight, dtype=torch.float64) for x, _, weight in self.batches()])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n, a, o = draw(st.integers(1, 40)), draw(st.integers(1, 13)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    offset = draw(st.sampled_from([0.0, 1.0, 30.0]))
    scale = 10.0 ** torch.randint(-2, 3, (a,), generator=generator)
    x = (torch.randn(n, a, generator=generator) + offset) * scale
    t = torch.randn(n, o, generator=generator) - 3 * offset
    cuts = draw(st.lists(st.integers(0, n), max_size=5))
    weights = draw(st.lists(st.sampled_from([0.25, 1.0, 1.5, 4.0]), min_size=6, max_size=6))
    return Case(x, t, cuts, weights)


def streamed(case: Case, *, centre: bool, targets: bool = True) -> Moments:
    result = Moments(case.x.shape[1], case.t.shape[1] if targets else 0, centre=centre)
    for x, t, weight in case.batches():
        result.update(x, t if targets else None, weight)
    return result


def close(found: Tensor | float, wanted: Tensor | float, size: Tensor | float) -> bool:
    gap = torch.as_tensor(found).double() - torch.as_tensor(wanted)
    return bool((gap.abs() <= TOLERANCE * torch.as_tensor(size) + 1e-30).all())


@given(case=cases(), centre=st.booleans())
@settings(max_examples=150, deadline=None)
def test_streamed_moments_equal_moments_of_all_rows(case, centre):
    found = streamed(case, centre=centre)
    x, t, w = case.x.double(), case.t.double(), case.row_weights
    mean_a, mean_o = w @ x / w.sum(), w @ t / w.sum()
    # Rounding is relative to rows minus an origin near the mean of their batch.
    assert found.count == pytest.approx(float(w.sum()))
    assert close(found.mean_a, mean_a, x.abs().amax(0))
    assert close(found.mean_o, mean_o, t.abs().amax(0))
    assert close(found.mean_square_a(), w @ x.square() / w.sum(), x.square().amax(0))
    first = next(len(x) for x, _, _ in case.batches() if len(x))
    first = min(first, 7)
    seen_x, seen_t = (x - x[:first].mean(0), t - t[:first].mean(0)) if centre else (x, t)
    if centre:
        x, t = x - mean_a, t - mean_o
    root = w.sqrt()[:, None]
    size_a = (root * seen_x).norm(dim=0) + 1e-6 * (root * case.x).norm(dim=0)
    size_o = (root * seen_t).norm(dim=0) + 1e-6 * (root * case.t).norm(dim=0)
    assert close(found.gram(), (root * x).T @ (root * x), torch.outer(size_a, size_a))
    assert close(found.cross(), (root * x).T @ (root * t), torch.outer(size_a, size_o))
    assert close(found.energy(), (root * t).square().sum(), size_o.square().sum())
    assert close(found.gram(), found.gram().T, 0.05 * torch.outer(size_a, size_a))
    assert found.finite()
    # `take` returns the same matrices, and leaves all else in place.
    gram, squares = found.gram(), found.mean_square_a()
    assert torch.equal(found.take()[0], gram)
    assert torch.equal(found.mean_square_a(), squares)
    assert found.finite()
    # Without targets, the sums over inputs are the same ones.
    alone = streamed(case, centre=centre, targets=False)
    assert torch.equal(alone.gram(), gram)
    assert torch.equal(alone.mean_a, found.mean_a)
    assert alone.cross().shape == (case.x.shape[1], 0)
    assert alone.energy() == 0


def test_a_large_mean_does_not_cancel():
    """The spread is a thousandth of the mean: the centred Gram matrix keeps its digits, unlike an uncentred one."""
    generator = torch.Generator().manual_seed(0)
    x = 1000 + torch.randn(512, 4, generator=generator)
    t = x @ torch.randn(4, 3, generator=generator)
    found = Moments(4, 3, centre=True)
    for start in range(0, 512, 64):
        found.update(x[start : start + 64], t[start : start + 64])
    centred = x.double() - x.double().mean(0)
    wanted = centred.T @ centred
    assert float((found.gram() - wanted).abs().max() / wanted.diagonal().max()) < 1e-5
    assert found.energy() == pytest.approx(float((t.double() - t.double().mean(0)).square().sum()), rel=1e-5)


@pytest.mark.parametrize("centre", [False, True])
def test_token_weights_equal_repeated_rows(centre):
    torch.manual_seed(0)
    # Rows may be bfloat16.
    x, t, times = torch.randn(7, 5).bfloat16(), torch.randn(7, 3), torch.tensor([1, 2, 0, 3, 1, 1, 2])
    weighted, repeated = (Moments(5, 3, centre=centre) for _ in range(2))
    weighted.update(x, t, 0.5, times.float())
    repeated.update(x.float().repeat_interleave(times, 0), t.repeat_interleave(times, 0), 0.5)
    for name in ("gram", "cross", "energy", "mean_a", "mean_o", "count"):
        one, two = (getattr(sums, name) for sums in (weighted, repeated))
        one, two = (one(), two()) if callable(one) else (one, two)
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(two), atol=1e-5, rtol=0, check_dtype=False)
