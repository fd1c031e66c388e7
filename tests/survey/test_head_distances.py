"""Distances between heads equal SciPy's, on the attention maps that transformers returns."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from models import ROWS, build, opened, token_rows
from secateur.model.rows import Rows
from secateur.steps.options import LARGEST_TAU
from secateur.survey import head_distances as module_under_test
from secateur.survey.head_distances import head_distances, jensen_shannon

CLOSE = 2e-6


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use several chunks of query positions in each batch, the last one shorter."""
    monkeypatch.setattr(module_under_test, "CHUNK", 6 * 24 * 2 * 5)


def attentions(name: str, ids: Tensor) -> list[Tensor]:
    """Return the attention probabilities of every block (b x h x t x t), from the whole model."""
    model = build(name, attn_implementation="eager")
    with torch.no_grad():
        return list(model(ids, use_cache=False, output_attentions=True).attentions)


def reference(maps: Tensor) -> np.ndarray:
    """Return the mean squared Jensen-Shannon distance of all pairs (h x h), computed one by one."""
    heads, keys = maps.shape[1], maps.shape[-1]
    rows = maps.transpose(0, 1).reshape(heads, -1, keys).double().numpy()
    return np.array([[(jensenshannon(p, q, axis=1) ** 2).mean() for q in rows] for p in rows])


def near(found: Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found.numpy(), wanted, atol=CLOSE, rtol=1e-4)


@pytest.mark.parametrize("name", ROWS)
def test_distances_equal_scipys(checkpoint_folder, name):
    """The models have grouped queries, windows, softcaps, scales and query norms."""
    ids = token_rows(5)
    found = head_distances(opened(checkpoint_folder(name)), ids)
    maps = attentions(name, ids)
    assert list(found) == list(range(len(maps)))
    for index, one in enumerate(maps):
        wanted = reference(one)
        # Heads of random weights attend to different places, and no two pairs alike.
        assert np.ptp(wanted[np.triu_indices(6, 1)]) > 1000 * CLOSE
        near(found[index], wanted)


def test_groups_of_rows_are_weighted(checkpoint_folder):
    first, second, third = token_rows(3, 24), token_rows(4, 15, seed=1), token_rows(2, 9, seed=2)
    rows = Rows((first, second, third), (1.0, 0.25, 0.0))
    found = head_distances(opened(checkpoint_folder("llama biased")), rows)
    a, b = attentions("llama biased", first), attentions("llama biased", second)
    for index in range(3):
        counts = 72, 0.25 * 60
        wanted = (counts[0] * reference(a[index]) + counts[1] * reference(b[index])) / sum(counts)
        near(found[index], wanted)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 5).flatmap(
        lambda keys: st.lists(
            # Half of the least subnormal number is 0, and with that SciPy's logarithm is infinite.
            st.lists(st.floats(0, 1, allow_subnormal=False), min_size=keys, max_size=keys).filter(
                lambda row: sum(row) > 1e-3
            ),
            min_size=2,
            max_size=5,
        )
    )
)
def test_divergences_are_between_zero_and_ln_2(rows):
    p = torch.tensor(rows, dtype=torch.float64)
    p = p / p.sum(1, keepdim=True)
    found = jensen_shannon(p[:, None])
    wanted = np.array([[np.nan_to_num(jensenshannon(a, b)) ** 2 for b in p.numpy()] for a in p.numpy()])
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-12)
    assert torch.equal(found, found.T)
    assert not found.diagonal().any()
    assert float(found.max()) <= LARGEST_TAU + 1e-12
    apart = jensen_shannon(torch.tensor([[[0.3, 0.7, 0.0, 0.0]], [[0.0, 0.0, 0.1, 0.9]]]))
    assert apart[0, 1] == pytest.approx(LARGEST_TAU, abs=1e-7)
