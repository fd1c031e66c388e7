"""Recoveries on whole models, against the same steps done by hand in float64."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import blocks_of, build, layers_of, narrowed, reading, relative, seen, token_rows, wide
from secateur.checkpoints.checkpoint import open_checkpoint
from secateur.criteria.registry import SCORED_KINDS
from secateur.fit import regression
from secateur.fit.fitted_block import FittedBlock
from secateur.fit.loop import refit
from secateur.fit.recoveries import Refit
from secateur.fit.recovery import Method, Recovery, all_recoveries, recovery_of
from secateur.fit.target import ModuleTarget
from secateur.model.describe import describe
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.model.structure import PrunableModule
from secateur.model.surgery import assign, kept_inputs
from secateur.plan.problem import Plan

IDS = token_rows(12, 20, seed=9)
RIDGE = 0.3
WIDTHS = dict.fromkeys(("llama biased", "llama", "gemma2", "gemma3 biased", "gemma3_text"), wide(2, 2, 50))
WIDTHS |= {"granite biased": wide(2, 2, 50), "olmo2": wide(3, 2, 50)}
WIDTHS |= dict.fromkeys(("gpt2", "opt", "gpt_neox"), wide(4, 1, 60))
"""Two thirds or so of each module."""


@dataclass(frozen=True)
class OwnOutput(Refit):
    """The refit, with each module's own dense output as its target."""

    fits_own_output = True


def some_recovery(method: str | type[Recovery] = "refit", **settings: Any) -> Recovery:
    """Return a recovery by its name, with the settings that are fields of it."""
    if not isinstance(method, str):
        return method(**settings)
    own = {field.name for field in fields(all_recoveries()[method])}
    return recovery_of(method, **{name: value for name, value in settings.items() if name in own})


def run(folder: Path, name: str, rows: Tensor | Rows = IDS, *, criterion: str = "surgeon", **recovery: Any) -> Any:
    """Return the fitted blocks of a row; tokens have equal weights unless a recovery says otherwise."""
    plan = Plan(dict.fromkeys(range(3), WIDTHS[name]), 0.3, 0.3)
    method = Method(criterion, some_recovery(**{"ridge": RIDGE, "cauchy_scale": math.inf} | recovery))
    return list(refit(BlockStream(open_checkpoint(folder)), plan, rows, method=method))


def pruned_model(name: str, found: list[FittedBlock]) -> nn.Module:
    return narrowed(build(name), {b.index: b.keep for b in found}, {b.index: b.changed for b in found})


def least_squares(x: Tensor, t: Tensor, old: Tensor, ridge: float = RIDGE, *, intercept: bool) -> tuple[Tensor, Tensor]:
    """Return weights (inputs x outputs) and bias, with a ridge toward the old weights relative to each input's energy.

    Without a ridge, the solution is the nearest to the old weights, with each input in units of its energy.
    """
    mean_x, mean_t = x.mean(0) * intercept, t.mean(0) * intercept
    x, t = x - mean_x, t - mean_t
    size = x.square().sum(0).sqrt()
    rows, targets = torch.cat([x / size, ridge**0.5 * torch.eye(len(old))]), torch.cat([t - x @ old, 0 * old])
    change = torch.from_numpy(np.linalg.lstsq(rows.numpy(), targets.numpy(), rcond=None)[0])
    weight = old + change / size[:, None]
    return weight, mean_t - mean_x @ weight


def matrix(layer: nn.Module, path: str) -> Tensor:
    """A layer's weight, inputs first."""
    weight = layer.get_submodule(path).weight
    return weight if type(layer.get_submodule(path)).__name__ == "Conv1D" else weight.T


def put(layer: nn.Module, path: str, weight: Tensor, bias: Tensor | None) -> None:
    transposed = type(layer.get_submodule(path)).__name__ == "Conv1D"
    assign(layer, f"{path}.weight", (weight if transposed else weight.T).contiguous())
    if bias is not None:
        assign(layer, f"{path}.bias", bias)


def fit_level1(module: PrunableModule, dense: Any, pruned: Any, index: int, ridge: float) -> None:
    layer, original = layers_of(pruned)[index], layers_of(dense)[index]
    x, dense_input = seen(pruned, index, module.input_layer, IDS)[0], seen(dense, index, module.input_layer, IDS)[0]
    for path in dict.fromkeys(slab.name.rpartition(".")[0] for slab in module.input_projections):
        old, bias = matrix(original, path), original.get_submodule(path).bias
        target = dense_input @ old + (0 if bias is None else bias)
        weight, shift = least_squares(x, target, old, ridge, intercept=bias is not None)
        put(layer, path, weight, None if bias is None else shift)


def fit_output_projection(
    module: PrunableModule, dense: Any, pruned: Any, index: int, entries: Tensor, ridge: float
) -> None:
    """The kept entries; what goes becomes zero, so that the whole model computes as the narrow one would."""
    layer = layers_of(pruned)[index]
    x, dense_output = seen(pruned, index, module.output_layer, IDS)[0], seen(dense, index, module.output_layer, IDS)[1]
    old = matrix(layers_of(dense)[index], module.output_layer)
    weight, shift = least_squares(x[:, entries], dense_output, old[entries], ridge, intercept=module.bias is not None)
    full = torch.zeros_like(old)
    full[entries] = weight
    put(layer, module.output_layer, full, shift if module.bias else None)


def paper(name: str, found: list[FittedBlock], when: str, ridge: float = RIDGE) -> list[dict[str, Tensor]]:
    """Algorithms 1, 3 and 4 for units that are chosen already; weights of every block, at full width."""
    dense, pruned = build(name).double(), build(name).double()
    for block in found:
        index, layer = block.index, layers_of(pruned)[block.index]
        described = describe(dense.config, layer)
        for kind in SCORED_KINDS:
            module = described.module(kind)
            kept = kept_inputs(module, block.keep[kind])
            everything = torch.arange(module.units * module.size)
            fit_level1(module, dense, pruned, index, ridge)
            if when == "before":
                # All units are refitted, and those that go are then left out.
                fit_output_projection(module, dense, pruned, index, everything, ridge)
                full = torch.zeros_like(matrix(layer, module.output_layer))
                full[kept] = matrix(layer, module.output_layer)[kept]
                put(layer, module.output_layer, full, None)
            else:
                fit_output_projection(module, dense, pruned, index, kept, ridge)
    return [{name: value.clone() for name, value in layer.named_parameters()} for layer in layers_of(pruned)]


@pytest.mark.parametrize(
    ("name", "when", "criterion", "ridge"),
    [
        (name, *case)
        for name in ("llama biased", "llama", "gpt2", "opt")
        for case in (("after", "surgeon", RIDGE), ("before", "second-moment", RIDGE), ("both", "second-moment", RIDGE))
    ]
    # Outputs of a LayerNorm lie in a plane: of many solutions, the nearest to the old weights is taken.
    + [(name, when, "surgeon", 0.0) for name in ("gpt2", "opt") for when in ("after", "before")],
)
def test_the_paper_recovery_equals_its_algorithms(checkpoint_folder, name, when, criterion, ridge):
    found = run(checkpoint_folder(name), name, method="paper", when=when, criterion=criterion, ridge=ridge)
    blocks, wanted = blocks_of(build(name)), paper(name, found, when, ridge)
    for block, reference in zip(found, wanted, strict=True):
        names: set[str] = set()
        for kind in SCORED_KINDS:
            module = blocks[block.index].module(kind)
            output, kept = module.output_projection, kept_inputs(module, block.keep[kind])
            own = {output.name, *(slab.name for slab in module.input_projections), *filter(None, [module.bias])}
            for path in own:
                one, other = block.changed[path], reference[path].float()
                if path == output.name:
                    one, other = (value.index_select(output.axis, kept) for value in (one, other))
                assert relative(one, other) < 2e-4, path
            names |= own
        assert block.changed.keys() == names


def test_projections_of_a_latent_vector_are_not_refitted(checkpoint_folder):
    """The output projection is refitted as usual; the projections do not read the module's input."""
    stream = BlockStream(open_checkpoint(checkpoint_folder("youtu")))
    plan, attention = Plan({1: stream.blocks[1].width | {"kv_groups": 2}}, 0.3, 0.3), stream.blocks[1].modules[0]
    (found,) = refit(stream, plan, IDS, method=Method("surgeon", recovery_of(method="paper", ridge=RIDGE)))
    assert attention.output_projection.name in found.changed
    assert not found.changed.keys() & {slab.name for slab in attention.input_projections}


def output_error(name: str, found: list[FittedBlock]) -> float:
    """Return the squared error of the last block's output on the calibration rows, over the dense output's energy."""
    outputs: list[Tensor] = []
    for model in (build(name), pruned_model(name, found)):
        layers_of(model)[-1].register_forward_hook(lambda _, __, output: outputs.append(output))
        with torch.no_grad():
            model(IDS, use_cache=False)
    wanted, got = outputs
    return float((got - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_before_a_norm_each_output_takes_over_its_share_of_the_error(checkpoint_folder, name):
    """The first feed-forward by hand; it inherits the error that the pruned attention left."""
    found = run(checkpoint_folder(name), name)
    dense = build(name).double()
    described, layer = blocks_of(dense)[0], layers_of(dense)[0]
    first, module = described.modules
    pruned = narrowed(dense, {0: found[0].keep}, {0: {k: v.double() for k, v in found[0].changed.items()}})
    error = seen(dense, 0, first.post_norm, IDS)[1] - seen(pruned, 0, first.post_norm, IDS)[1]
    z, (after, own) = seen(dense, 0, module.output_layer, IDS)[1], seen(dense, 0, module.post_norm, IDS)
    assert torch.equal(z, after)
    able, missing = 0.1 * own.square().sum(0), error.square().sum(0)
    share = able / (able + missing)
    assert share.min() < 0.9 * share.max()
    gain, read = layer.get_submodule(module.post_norm)(torch.ones_like(z[:1])), reading(dense, 0, "channels")
    divided = 1 / (z.square().mean(1, keepdim=True) + 1e-6).sqrt()
    kept = torch.tensor(found[0].keep["channels"])
    x, old = seen(pruned, 0, module.output_layer, IDS)[0] * divided, matrix(layer, module.output_layer)[kept]
    for repaired in (True, False):
        target = (own + share * error * repaired) * read
        best, _ = least_squares(x, target, old * gain * read, intercept=False)
        off = relative(found[0].changed[module.output_projection.name].double().T[kept] * gain * read, best)
        assert off < 1e-4 if repaired else off > 1e-3


# Before a norm, as in Gemma 2 and OLMo 2, each output takes over its share of the error.
@pytest.mark.parametrize(
    "name", ["llama", "llama biased", "gpt2", "opt", "gpt_neox", "granite biased", "gemma2", "olmo2"]
)
def test_the_error_aware_target_has_a_smaller_error(checkpoint_folder, name):
    folder = checkpoint_folder(name)
    bare = run(folder, name, method="none")
    found = (run(folder, name), run(folder, name, method=OwnOutput), bare)
    aware, own, none = (output_error(name, blocks) for blocks in found)
    assert aware < own < none
    for block in bare:
        stored = layers_of(build(name))[block.index]
        assert all(relative(tensor, stored.get_parameter(path)) < 1e-6 for path, tensor in block.changed.items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "granite biased"])
def test_the_last_report_equals_the_pruned_models_error(checkpoint_folder, name):
    """The last report covers the whole residual error after the last block."""
    found = run(checkpoint_folder(name), name)
    report = found[-1].reports[-1]
    assert (report.kind, report.kept) == ("channels", WIDTHS[name].channels)
    assert report.relative == pytest.approx(output_error(name, found), rel=1e-3)


def test_a_group_of_weight_two_equals_the_group_twice(checkpoint_folder, monkeypatch):
    # In bfloat16, what is stored of a token is rounded with its weight in it.
    monkeypatch.setattr(regression, "fast_dtype", lambda _: torch.float32)
    first, second = IDS[:8], IDS[8:]
    weighted, repeated = (
        run(checkpoint_folder("gpt2"), "gpt2", rows)
        for rows in (Rows((first, second), (1.0, 2.0)), torch.cat([first, second, second]))
    )
    assert_equal_fits(weighted, repeated, 1e-3)


def assert_equal_fits(found: list[FittedBlock], wanted: list[FittedBlock], tolerance: float) -> None:
    """Assert that the same units are kept, with weights and errors that differ little."""
    for one, two in zip(found, wanted, strict=True):
        assert one.keep == two.keep
        assert one.changed.keys() == two.changed.keys()
        assert all(relative(one.changed[path], two.changed[path]) < tolerance for path in two.changed)
        errors = [report.relative for report in two.reports]
        assert [report.relative for report in one.reports] == pytest.approx(errors, rel=10 * tolerance, abs=1e-7)


def test_a_bias_that_stays_is_no_inherited_error(checkpoint_folder, monkeypatch):
    """Nothing is inherited by the first attention, which keeps its bias, so all tokens count alike."""
    weights, find = [], ModuleTarget._weights

    def found(target: ModuleTarget, *given: Tensor) -> Tensor | None:
        weights.append((target.module.kind, target.state.index, find(target, *given)))
        return weights[-1][-1]

    monkeypatch.setattr(ModuleTarget, "_weights", found)
    stream = BlockStream(open_checkpoint(checkpoint_folder("bloom")))
    plan = Plan({0: stream.blocks[0].width | {"channels": 40}}, 0.1, 0.1)
    list(refit(stream, plan, IDS, method=Method("surgeon", recovery_of("refit"))))
    first = [values for *place, values in weights if place == ["heads", 0]]
    assert first
    assert all((values > 0.99).all() for values in first)


def test_tokens_with_a_large_inherited_error_get_smaller_weights(checkpoint_folder):
    """The first feed-forward by hand; it inherits the error that the pruned attention left."""
    found = run(checkpoint_folder("llama"), "llama", cauchy_scale=2.0)
    dense, module = build("llama").double(), blocks_of(build("llama"))[0].modules[-1]
    pruned = narrowed(dense, {0: found[0].keep}, {0: {k: v.double() for k, v in found[0].changed.items()}})
    missing = seen(dense, 0, "self_attn.o_proj", IDS)[1] - seen(pruned, 0, "self_attn.o_proj", IDS)[1]
    inherited = missing.square().sum(1)
    root = (1 / (1 + inherited / (2.0 * inherited.median()))).sqrt()[:, None]
    # The narrow model's level-2 input holds the kept channels only.
    x, target = seen(pruned, 0, module.output_layer, IDS)[0], seen(dense, 0, module.output_layer, IDS)[1] + missing
    kept = torch.tensor(found[0].keep["channels"])
    old = matrix(layers_of(dense)[0], module.output_layer)[kept]
    best, _ = least_squares(x * root, target * root, old, intercept=False)
    assert relative(found[0].changed[module.output_projection.name].double().T[kept], best) < 1e-4
    plain, _ = least_squares(x, target, old, intercept=False)
    assert relative(plain, best) > 1e-2
