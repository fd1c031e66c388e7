"""Divergences of probes are exact with a small vocabulary, and nearly exact and in the same order with a large one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.survey.probes import DRAWN_TOKENS, LIKELY_TOKENS, divergences, sampled_tokens


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


def test_weights_of_tokens_add_up_to_one():
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(2))
    assert estimated(logits, [logits + 3.0]).abs().max() < 1e-12, "a constant changes nothing"
    tokens, weights = sampled_tokens(logits, torch.Generator().manual_seed(0))
    assert tokens.shape == weights.shape == (5, LIKELY_TOKENS + DRAWN_TOKENS)
    torch.testing.assert_close(weights.sum(1), torch.ones(5, dtype=torch.float64))
    # The likeliest are among them once, and no drawn one is one of these.
    for likely, drawn in zip(tokens[:, :LIKELY_TOKENS], tokens[:, LIKELY_TOKENS:], strict=True):
        assert len(set(likely.tolist())) == LIKELY_TOKENS
        assert not set(likely.tolist()) & set(drawn.tolist())
