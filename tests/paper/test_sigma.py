"""Covariance of the criterion second-moment: from calibration rows, the identity, or random token ids."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_criteria import assert_scores, scores_of, statistics
from torch import Tensor

from models import build, seen, token_rows, wide
from outputs import error_of, record_of
from secateur import prune
from secateur.commands.draw_rows import draw_rows
from secateur.commands.open_model import open_model
from secateur.criteria.order import error_curve, remaining_units, removal_order
from secateur.criteria.registry import all_criteria
from secateur.criteria.statistics import Statistics
from secateur.fit.loop import refit
from secateur.fit.method import Method
from secateur.fit.recovery import recovery_of
from secateur.model.checkpoint import open_checkpoint
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.model.surgery import output_weight
from secateur.numerics.moments import Moments
from secateur.plan.problem import Plan
from secateur.survey.survey import survey

SECOND_MOMENT = all_criteria()["second-moment"]


def identity(stats: Statistics) -> Tensor:
    return scores_of("second-moment-identity", stats)


def values_of(stats: Statistics) -> tuple[Tensor, Tensor]:
    """The value layer's rows and biases by architecture, spelled out: heads x size x hidden, heads x size."""
    module, w = stats.module, stats.tensors
    size, groups = module.size, module.groups
    if "attn.c_attn.weight" in w:
        rows, bias = w["attn.c_attn.weight"].T[2 * 48 :], w["attn.c_attn.bias"][2 * 48 :]
    elif "self_attn.kv_b_proj.weight" in w:
        # A head's keys, then its values.
        rows = w["self_attn.kv_b_proj.weight"].unflatten(0, (groups, -1))[:, -size:]
        bias = torch.zeros(groups * size)
    else:
        rows = w["self_attn.v_proj.weight"]
        bias = w.get("self_attn.v_proj.bias", torch.zeros(groups * size))
    return rows.reshape(groups, size, -1).double(), bias.reshape(groups, size).double()


@pytest.mark.parametrize("name", ["llama biased", "qwen2", "gpt2", "deepseek_v3"])
def test_identity_of_attention(name):
    stats, _, _, _ = statistics(name, "heads")
    rows, bias = values_of(stats)
    energy = rows.square().sum(-1) + bias.square()
    columns = stats.weight_ao.double().square().sum(-1).view(stats.module.units, -1)
    wanted = (0.5 * columns * energy.repeat_interleave(stats.module.per_group, 0)).sum(-1)
    assert_scores(identity(stats), wanted)


@pytest.mark.parametrize("name", ["llama", "llama biased", "phi3", "gpt2", "opt", "gpt_neox"])
def test_identity_of_channels_is_what_standard_normal_inputs_give(name):
    stats, _, _, _ = statistics(name, "channels")
    plain = identity(stats)
    basis = torch.linalg.qr(torch.randn(96, 48, generator=torch.Generator().manual_seed(0)).double())[0]
    x = torch.cat([basis, -basis]) * 96**0.5
    assert torch.allclose(x.T @ x / len(x), torch.eye(48, dtype=torch.float64), atol=1e-12)
    stats.input_moments = Moments(48)
    stats.input_moments.update(x.float())
    assert_scores(plain, scores_of("second-moment", stats))
    stats.moments = Moments(stats.moments.gram().shape[0])
    assert torch.equal(identity(stats), plain), "it sees no data"


TEXT, IDS = token_rows(6, 20, seed=9), token_rows(2, 7, seed=4)
WIDTHS = {"llama": wide(2, 2, 50), "llama biased": wide(2, 2, 50), "gpt2": wide(4, 1, 60), "opt": wide(4, 1, 60)}


def stats_on(name: str, kind: Any, ids: Tensor) -> Statistics:
    """Statistics of a module of block 0 in the dense model, on some ids."""
    stats, _, _, _ = statistics(name, kind, index=0)
    paths = stats.module.input_layer, stats.module.output_layer
    x, inner = (seen(build(name), 0, path, ids)[0] for path in paths)
    stats.input_moments, stats.moments = Moments(x.shape[1]), Moments(inner.shape[1])
    stats.input_moments.update(x)
    stats.moments.update(inner)
    stats.weight_ao = output_weight(stats.module, stats.tensors)
    return stats


@pytest.mark.parametrize("name", list(WIDTHS))
def test_the_feed_forward_behind_a_whole_attention(checkpoint_folder, name):
    """With all heads kept and nothing refitted, the first feed-forward sees what the dense one does."""
    stats = stats_on(name, "channels", IDS)
    whole = stats_on(name, "heads", IDS).module
    width = wide(whole.groups, whole.per_group, 50)
    plan = Plan({0: width}, 0.1, 0.1)
    method = Method("second-moment", recovery_of("none"))
    rows = Rows.of(TEXT).with_choice_rows(Rows.of(IDS))
    stream = BlockStream(open_checkpoint(checkpoint_folder(name)))
    keep = next(iter(refit(stream, plan, rows, method=method))).keep
    order = removal_order(SECOND_MOMENT, stats, "channels", 50)
    assert keep["channels"] == remaining_units(stats.module, "channels", order)
    text = removal_order(SECOND_MOMENT, stats_on(name, "channels", TEXT), "channels", 50)
    assert keep["channels"] != remaining_units(stats.module, "channels", text)


@pytest.mark.parametrize("name", list(WIDTHS))
def test_a_survey_orders_by_the_ids_and_measures_on_the_text(checkpoint_folder, name):
    stream = BlockStream(open_checkpoint(checkpoint_folder(name)))
    rows = Rows.of(TEXT).with_choice_rows(Rows.of(IDS))
    found = survey(stream, rows, probe_rows=token_rows(2, 20, seed=1), criterion="second-moment", kinds=("channels",))
    choice, model = stats_on(name, "channels", IDS), build(name)
    inner = seen(model, 0, choice.module.output_layer, TEXT)[0]
    norms = torch.linalg.vector_norm(seen(model, 0, "", TEXT)[1], dim=1, keepdim=True)
    stats = stats_on(name, "channels", TEXT)
    stats.moments = Moments(inner.shape[1])
    stats.moments.update(inner / norms)
    wanted = error_curve(SECOND_MOMENT, stats, "channels", 1, choice).errors / len(inner)
    errors = torch.tensor(found.curves[0].errors, dtype=torch.float64)
    torch.testing.assert_close(errors, wanted.double(), rtol=1e-3, atol=1e-6 * float(wanted[-1]))
    assert found.probes
    assert all(probe.divergence == probe.divergence for probe in found.probes)


SMALL: dict[str, Any] = {"samples": 8, "length": 16, "sparsity": 0.3, "criterion": "second-moment"}


def text_file(folder: Path) -> str:
    (folder / "text.txt").write_text(" ".join(f"w{i * i % 20}" for i in range(1000)))
    return str(folder / "text.txt")


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_each_sigma_chooses_other_units(checkpoint_folder, tmp_path, name):
    text, kept = text_file(tmp_path), {}
    for sigma in (None, "data", "identity", "random"):
        prune(checkpoint_folder(name), tmp_path / f"{sigma}", widths="uniform", format="hf", sigma=sigma,
              calibration=text, **SMALL)  # fmt: skip
        record = record_of(tmp_path / f"{sigma}")
        assert record["options"]["sigma"] == sigma
        kept[sigma] = [(block["heads"], block["channels"]) for block in record["blocks"]]
    assert kept[None] == kept["data"]
    assert kept["data"] != kept["identity"] != kept["random"] != kept["data"]


def test_random_ids_decide_alone(checkpoint_folder, tmp_path):
    options: dict[str, Any] = {"sigma": "random", "calibration": text_file(tmp_path), "refit_samples": 3, **SMALL}
    rows = draw_rows(open_model(checkpoint_folder("llama"), device="cpu", **options), resample=False)
    weights = rows.grouped.choice_weights
    (at,) = [index for index, weight in enumerate(weights) if weight]
    assert torch.equal(rows.grouped.groups[at], rows.random)


def test_a_survey_belongs_to_its_sigma(checkpoint_folder, tmp_path):
    model, how = checkpoint_folder("llama"), {"calibration": text_file(tmp_path), **SMALL}
    for out in ("a", "b"):
        prune(model, tmp_path / out, sigma="random", survey=tmp_path / "survey.json", **how)
    for other in ("data", "identity"):
        message = error_of(prune, model, tmp_path / "c", sigma=other, survey=tmp_path / "survey.json", **how)
        assert "a survey with criterion second-moment of random ids instead of" in message


@pytest.mark.parametrize("options", [{"criterion": "random"}, {"sigma": "random"}, {"criterion": "l1"}], ids=str)
def test_a_survey_by_chance_belongs_to_its_seed(checkpoint_folder, tmp_path, options):
    """A text of one row is the same for every seed, and still units leave in another order."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{token - 4}" for token in token_rows(1, 16)[0].tolist()))
    how = SMALL | {"samples": 1, "calibration": str(text), "recovery": "none"}
    again: dict[str, Any] = how | options | {"survey": tmp_path / "survey.json"}
    prune(checkpoint_folder("llama"), tmp_path / "zero", seed=0, **again)
    if options == {"criterion": "l1"}:
        prune(checkpoint_folder("llama"), tmp_path / "one", seed=1, **again)
    else:
        message = error_of(prune, checkpoint_folder("llama"), tmp_path / "one", seed=1, **again)
        assert "a survey with seed 0 instead of 1" in message
