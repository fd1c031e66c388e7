"""Gauss-Newton step on input projections: the linearised module, its least squares, and its effect on a model."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recovery import run
from torch import Tensor
from torch.nn.functional import silu
from transformers.activations import ACT2FN

from models import ROWS, SIMILAR, token_rows
from secateur.checkpoints.checkpoint import open_checkpoint
from secateur.checkpoints.facts import activation_of
from secateur.fit.input_projections import GaussNewtonStep, TangentRows, projection_outputs, tangent_factors
from secateur.fit.loop import refit
from secateur.fit.recovery import Method, recovery_of
from secateur.model.arena import Arena
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.plan.problem import Plan

IDS = token_rows(12, 20, seed=9)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def module(activation: Any, matrices: list[Tensor], weight_ko: Tensor, source_nd: Tensor) -> Tensor:
    """The module's outputs (n x o); up first, then the gate."""
    up, gate = source_nd @ matrices[0].T, source_nd @ matrices[-1].T
    return (activation(gate) if len(matrices) == 1 else activation(gate) * up) @ weight_ko


def tangent_of(
    activation: Any, matrices: list[Tensor], weight_ko: Tensor, source_nd: Tensor, residual_no: Tensor, counts_n: Tensor
) -> tuple[GaussNewtonStep, list[TangentRows]]:
    """The tangent of all tokens, added in two parts."""
    root = counts_n.sqrt()[:, None]
    tangent, parts = GaussNewtonStep(weight_ko, len(matrices), source_nd.shape[1], len(source_nd)), []
    for at in (slice(0, 5), slice(5, None)):
        found = tangent_factors(activation, [source_nd[at] @ matrix.T for matrix in matrices])
        parts.append(TangentRows(source_nd[at], [f * root[at] for f in found]))
        tangent.add(parts[-1], residual_no[at] * root[at], root[at])
    return tangent, parts


def solved(problem: list[Any], ridge: float, steps: int, activation: Any = silu) -> tuple[list[Tensor], Tensor]:
    """The changes after some iterations, and the residual that they leave."""
    tangent, parts = tangent_of(activation, *problem)
    changes = tangent.solve(lambda: parts, ridge, steps)
    return changes, problem[3] - torch.cat([tangent._jvp(part, changes) for part in parts])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "quick_gelu"])
def test_the_tangent_is_the_derivative(name, gated):
    matrices, weight, source = [drawn(i, 7, 4) for i in range(1 + gated)], drawn(2, 7, 3), drawn(3, 11, 4)
    change, outer = [drawn(4 + i, 7, 4) for i in range(1 + gated)], drawn(6, 11, 3)
    part = TangentRows(source, tangent_factors(ACT2FN[name], [source @ matrix.T for matrix in matrices]))
    tangent = GaussNewtonStep(weight, len(matrices), 4, 11)

    def of(*at: Tensor) -> Tensor:
        return module(ACT2FN[name], list(at), weight, source)

    pushed = torch.func.jvp(of, tuple(matrices), tuple(change))[1]
    torch.testing.assert_close(tangent._jvp(part, change), pushed)
    pulled = torch.func.vjp(of, *matrices)[1](outer)
    torch.testing.assert_close(tuple(tangent._vjp(part, outer)), pulled)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    gated=st.booleans(),
    ridge=st.floats(0.01, 3),
    channels=st.integers(1, 6),
    width=st.integers(1, 5),
    tokens=st.integers(6, 40),
)
def test_the_step_is_the_least_squares_solution(seed, gated, ridge, channels, width, tokens):
    matrices = [drawn(seed + i, channels, width) for i in range(1 + gated)]
    weight, source = drawn(seed + 2, channels, width), drawn(seed + 3, tokens, width)
    residual, counts = drawn(seed + 4, tokens, width), drawn(seed + 5, tokens).square() + 0.01
    tangent, parts = tangent_of(silu, matrices, weight, source, residual, counts)
    found = torch.stack(tangent.solve(lambda: parts, ridge, 400)).numpy().reshape(-1)

    size, root = channels * width, counts.sqrt().numpy()
    jacobian = np.zeros((tokens, width, len(matrices) * size))
    penalty = []
    for number, factor in enumerate(tangent_factors(silu, [source @ matrix.T for matrix in matrices])):
        # d y_to / d V_jk = D_jo f_tj s_tk
        derivative = np.einsum("jo,tj,tk->tojk", weight, factor, source).reshape(tokens, width, size)
        jacobian[:, :, number * size : (number + 1) * size] = derivative
        energy = weight.square().sum(1) * (counts[:, None] * factor.square()).sum(0)
        penalty.append(torch.outer(energy, (counts[:, None] * source.square()).sum(0) / counts.sum()).reshape(-1))
    rows = np.concatenate(
        [(jacobian * root[:, None, None]).reshape(tokens * width, -1), np.diag((ridge * torch.cat(penalty)).sqrt())]
    )
    targets = np.concatenate([(residual.numpy() * root[:, None]).reshape(-1), np.zeros(rows.shape[1])])
    expected = np.linalg.lstsq(rows, targets, rcond=None)[0]
    # What is left of the problem, as the solution itself may be ill-determined.
    best, got = (float(np.square(rows @ v - targets).sum()) for v in (expected, found))
    assert got == pytest.approx(best, rel=1e-6)
    if np.linalg.cond(rows) < 1e3:
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_two_iterations_solve_for_two_unknowns():
    """Conjugate gradients build on each other; steepest descent would need many more iterations."""
    source = drawn(2, 30, 2) * torch.tensor([1.0, 5.0])
    problem = [[drawn(0, 1, 2)], drawn(1, 1, 3), source, drawn(3, 30, 3), drawn(4, 30).square()]
    one, two, many = (solved(problem, 0.3, steps)[0][0] for steps in (1, 2, 200))
    torch.testing.assert_close(two, many, rtol=1e-9, atol=0)
    assert not torch.allclose(one, many, rtol=1e-3)


def test_one_step_is_enough_where_factors_and_inputs_are_independent():
    """Then the preconditioner is the curvature itself, except for damping on its diagonal."""
    weight = drawn(1, 5, 6) * torch.tensor([[0.1], [0.3], [1.0], [3.0], [10.0]])
    source, residual = drawn(2, 50, 4) * torch.tensor([0.1, 1.0, 3.0, 10.0]), drawn(4, 50, 6)
    problem = [[drawn(0, 5, 4)], weight, source, residual, torch.ones(50, dtype=torch.float64)]
    _, left = solved(problem, 0.0, 1, lambda x: 2 * x)
    best = torch.linalg.lstsq(weight.T, torch.linalg.lstsq(source, residual).solution.T).solution.T
    least = residual - source @ best @ weight
    gained, possible = ((residual.square() - one.square()).sum() for one in (left, least))
    assert gained > 0.99 * possible > 0


@pytest.mark.parametrize("name", ROWS | SIMILAR)
def test_projection_outputs_are_those_of_the_model(checkpoint_folder, name):
    """Up and gate in the right order, with their biases, and with the family's activation."""
    stream = BlockStream(open_checkpoint(checkpoint_folder(name)))
    block = stream.blocks[1].modules[-1]
    seen: list[Tensor] = []
    rows, kept = Rows.of(token_rows(2, 9)), torch.tensor([2, 3, 11, 40])
    with Arena() as arena, stream.filled(1) as layer:
        hidden, at = stream.embed(rows, arena), next(iter(rows.batches()))
        watch = dict.fromkeys((block.input_layer, block.output_layer), lambda x, _: seen.append(x))
        stream.run(1, layer, hidden[at], at.group, watch=watch)
        source = seen[0].reshape(-1, stream.width)
        pre = projection_outputs(block, dict(layer.named_parameters()), source, kept)
        value = activation_of(stream.checkpoint.config, layer)(pre[-1])
    expected = value * pre[0] if len(pre) == 2 else value
    torch.testing.assert_close(expected, seen[-1].reshape(len(source), -1)[:, kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama biased", "gpt2", "gemma2", "olmo2", "opt", "gpt_neox", "granite biased"])
def test_the_step_reduces_the_error_of_a_feed_forward(checkpoint_folder, name):
    folder = checkpoint_folder(name)
    alone, both, longer = (run(folder, name, input_steps=steps, cauchy_scale=1.0) for steps in (0, 4, 12))
    # The first block's module sees the same input and target in all.
    errors = [found[0].reports[1].error for found in (alone, both, longer)]
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < errors[1]
    module = BlockStream(open_checkpoint(folder)).blocks[0].modules[-1]
    assert {slab.name for slab in module.channel_projections} <= set(both[0].changed)
    assert not {slab.name for slab in module.channel_projections} & set(alone[0].changed)
    # Attention is fitted as ever.
    assert both[0].reports[0] == alone[0].reports[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_step_that_raises_the_error_is_undone(checkpoint_folder, name, monkeypatch):
    folder = checkpoint_folder(name)
    alone = run(folder, name, input_steps=0)
    monkeypatch.setattr(
        GaussNewtonStep, "solve", lambda self, *_: [100 * torch.ones_like(r).float() for r in self.gradient]
    )
    found = run(folder, name, input_steps=4)
    for one, other in zip(found, alone, strict=True):
        assert one.keep == other.keep
        for path, tensor in other.changed.items():
            torch.testing.assert_close(one.changed[path], tensor)


def test_unpruned_modules_keep_their_input_projections(checkpoint_folder):
    """A module at full width after dense blocks: its input projections are bitwise unchanged."""
    stream = BlockStream(open_checkpoint(checkpoint_folder("llama")))
    plan = Plan({0: stream.blocks[0].width}, 0.0, 0.0)
    (found,) = refit(stream, plan, IDS, method=Method(recovery=recovery_of(input_steps=4, cauchy_scale=math.inf)))
    assert not {slab.name for slab in stream.blocks[0].modules[-1].channel_projections} & set(found.changed)
