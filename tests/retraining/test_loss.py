"""The loss of a training equals its formula, and so does its gradient; the head equals the model's own logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from models import ROWS, token_rows
from secateur.base.processes import Processes
from secateur.checkpoints.checkpoint import open_checkpoint
from secateur.model.arena import Activations
from secateur.retraining import loss as losses
from secateur.retraining.loss import distribution_loss
from secateur.retraining.student import Student
from secateur.retraining.targets import Targets

TOKENS, WIDTH, VOCABULARY = 12, 8, 30


@pytest.fixture
def head() -> torch.nn.Linear:
    """Output layer with a bias, in float64."""
    torch.manual_seed(0)
    return torch.nn.Linear(WIDTH, VOCABULARY).double().requires_grad_(False)


def student(folder: Path, rank: int) -> Student:
    torch.manual_seed(0)
    how: dict[str, Any] = {"products": torch.float32, "device": torch.device("cpu"), "processes": Processes()}
    return Student(open_checkpoint(folder), rank=rank, **how)


@pytest.fixture
def hidden() -> torch.Tensor:
    """Hidden states of all tokens."""
    return torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kept", [1, 5, VOCABULARY])
@pytest.mark.parametrize("at_once", [VOCABULARY, 5 * VOCABULARY, 10**6])
def test_the_loss_and_its_gradient_equal_the_formula(monkeypatch, head, hidden, kept, at_once):
    """With some of the teacher's tokens or all of them, and for any number of tokens at a time."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    full = torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(2)).double().log_softmax(-1)
    log_p, ids = full.topk(kept)
    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    found = distribution_loss(inputs[0], head, ids, log_p, VOCABULARY)
    log_q = head(inputs[1]).log_softmax(-1)
    wanted = (log_p.exp() * (log_p - log_q.gather(-1, ids))).sum(-1)
    if kept < VOCABULARY:
        p, q = (1 - one.gather(-1, ids).exp().sum(-1) for one in (full, log_q))
        wanted = wanted + p * (p / q).log()
    (3 * found).backward()
    (3 * wanted.mean()).backward()
    torch.testing.assert_close(found.double(), wanted.mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kept", [3, VOCABULARY])
def test_mixed_targets_add_the_next_token_to_the_teachers_distribution(kept):
    """The next token gains its weight, whether or not the teacher finds it likely; only the last position has none."""
    generator = torch.Generator().manual_seed(4)
    full = (3 * torch.randn(2, TOKENS, VOCABULARY, generator=generator)).log_softmax(-1)
    rows = torch.randint(VOCABULARY, (2, TOKENS), generator=generator)
    log_p, ids = full.topk(kept)
    teacher = Activations([ids.int()]), Activations([log_p])
    found_ids, found_log_p = Targets(rows, 0.3, teacher).of(torch.tensor([1, 0]))
    found = torch.zeros(2, TOKENS, VOCABULARY).scatter_(-1, found_ids, found_log_p.exp())
    dense = full[[1, 0]].exp()
    top = torch.zeros_like(dense).scatter_(-1, ids[[1, 0]], log_p[[1, 0]].exp())
    wanted, following = 0.7 * top[:, :-1], rows[[1, 0]][:, 1:, None]
    listed = (ids[[1, 0]][:, :-1] == following).any(-1, keepdim=True)
    dropped = ids[[1, 0]][:, :-1, -1:]
    wanted.scatter_(-1, dropped, torch.where(listed, wanted.gather(-1, dropped), 0.0))
    wanted.scatter_add_(-1, following, torch.full(following.shape, 0.3))
    assert bool(listed.any())
    assert bool(listed.all()) == (kept == VOCABULARY)
    torch.testing.assert_close(found[:, :-1], wanted)
    torch.testing.assert_close(found[:, -1], top[:, -1])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", [name for name in ROWS if name != "qwen2"])
def test_the_loss_of_rows_is_that_of_the_models_own_logits(checkpoint_folder, name, recompute):
    """In every family, with the gradient of every trained weight, whether or not blocks are computed again."""
    ids = token_rows(3)
    one, other = (student(checkpoint_folder(name), rank=0) for _ in range(2))
    one.rows, one.targets = ids, Targets(ids)
    if recompute:
        one.recompute()
    found = one(torch.arange(len(ids)))["loss"]
    logits = other.network(input_ids=ids, use_cache=False).logits
    wanted = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    found.backward()
    wanted.backward()
    for (path, value), reference in zip(one.trained().items(), other.trained().values(), strict=True):
        if reference.grad is not None:
            # The exact gradient of a key's bias is zero.
            room = 1e-3 * float(reference.grad.abs().max()) + 1e-6
            assert float((value.grad - reference.grad).abs().max()) < room, path
