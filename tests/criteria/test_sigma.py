"""Covariance of the criterion second-moment: from calibration rows, the identity, or random token ids."""

from typing import Any

import pytest
import torch
from test_criteria import assert_scores, scores_of, statistics
from torch import Tensor

from models import build, seen, token_rows, wide
from outputs import error_of, record_of
from secateur import prune
from secateur.checkpoints.checkpoint import open_checkpoint
from secateur.criteria.order import remaining_units, removal_order
from secateur.criteria.registry import all_criteria
from secateur.criteria.statistics import Statistics
from secateur.fit.loop import refit
from secateur.fit.recovery import Method, recovery_of
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.model.surgery import output_weight
from secateur.numerics.moments import Moments
from secateur.plan.problem import Plan

SECOND_MOMENT = all_criteria()["second-moment"]


def identity(stats: Statistics) -> Tensor:
    return scores_of("second-moment-identity", stats)


@pytest.mark.parametrize("name", ["llama biased", "qwen2", "deepseek_v3"])
def test_identity_of_attention(name):
    stats, _, _, _ = statistics(name, "heads")
    module, w = stats.module, stats.tensors
    values = w["self_attn.kv_b_proj.weight" if name == "deepseek_v3" else "self_attn.v_proj.weight"]
    # A head's keys come before its values if one layer computes both.
    rows = values.double().unflatten(0, (module.groups, -1))[:, -module.size :]
    bias = w.get("self_attn.v_proj.bias", torch.zeros(module.groups * module.size)).view(module.groups, -1)
    energy = rows.square().sum(-1) + bias.square()
    columns = stats.weight_ao.double().square().sum(-1).view(module.units, -1)
    assert_scores(identity(stats), (0.5 * columns * energy.repeat_interleave(module.per_group, 0)).sum(-1))


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


@pytest.mark.parametrize("name", ["llama", "llama biased", "gpt2", "opt"])
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


SMALL: dict[str, Any] = {"samples": 8, "length": 16, "sparsity": 0.3, "criterion": "second-moment"}


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_each_sigma_chooses_other_units(checkpoint_folder, tmp_path, name):
    text, kept = tmp_path / "text.txt", {}
    text.write_text(" ".join(f"w{i * i % 20}" for i in range(1000)))
    for sigma in (None, "data", "identity", "random"):
        prune(checkpoint_folder(name), tmp_path / f"{sigma}", widths="uniform", format="hf", sigma=sigma,
              calibration=str(text), **SMALL)  # fmt: skip
        record = record_of(tmp_path / f"{sigma}")
        assert record["options"]["sigma"] == sigma
        kept[sigma] = [(block["heads"], block["channels"]) for block in record["blocks"]]
    assert kept[None] == kept["data"]
    assert kept["data"] != kept["identity"] != kept["random"] != kept["data"]


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
