"""Algorithm 2 and what is made of it: thresholds, groups, copies of heads, combinations, and every mistake."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import CheckpointFolder
from models import (
    blocks_of,
    build,
    layers_of,
    load_written,
    logits_of,
    make_tokenizer,
    relative,
    selected,
    token_rows,
    wide,
)
from outputs import error_of, record_of
from secateur.base.quiet import quiet
from secateur.checkpoints.checkpoint import open_checkpoint
from secateur.model.stream import BlockStream
from secateur.model.surgery import entries, width_of
from secateur.plan.meters import parameter_meter
from secateur.plan.problem import PlanProblem
from secateur.plan.similar_heads import candidates, find_similar_heads, loadable, similar_plan
from secateur.steps import survey_model
from secateur.steps.options import Options
from secateur.steps.prune import prune

# Below 32 rows none is left out of the refit, so that the final norm stays as it is.
SMALL: dict[str, Any] = {"samples": 30, "length": 24, "calibration": "random"}
SIMILAR: dict[str, Any] = SMALL | {"criterion": "similarity"}
UNGROUPED = ["opt", "gpt2", "gpt_neox", "llama every head", "gemma2 every head", "gpt2 scaled"]


def table(heads: int, near: dict[tuple[int, int], float], far: float = 0.6) -> Tensor:
    """Distances, `far` where nothing else is said."""
    result = torch.full((heads, heads), far, dtype=torch.float64).fill_diagonal_(0)
    for (i, j), value in near.items():
        result[i, j] = result[j, i] = value
    return result


def algorithm2(distances: Tensor, tau: float) -> list[int]:
    """Algorithm 2 as the paper writes it."""
    found: list[int] = []
    for i in range(len(distances)):
        for j in range(len(distances)):
            if i != j and distances[i, j] < tau and i not in found and j not in found:
                found.append(i)
    return found


@st.composite
def distance_tables(draw: st.DrawFn) -> Tensor:
    heads = draw(st.integers(1, 9))
    values = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4])
    return table(heads, {pair: draw(values) for pair in itertools.combinations(range(heads), 2)})


@settings(deadline=None)
@given(distance_tables(), st.sampled_from([0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5]))
def test_candidates_are_those_of_algorithm_2(distances, tau):
    found = candidates(distances, tau)
    assert list(found) == algorithm2(distances, tau)
    free = [head for head in range(len(distances)) if head not in found]
    assert all(distances[i, j] >= tau for i, j in itertools.combinations(free, 2)), "no two that stay are similar"
    assert free


def wish_of(folder: CheckpointFolder, name: str) -> PlanProblem:
    stream = BlockStream(open_checkpoint(folder(name)))
    parameters = parameter_meter(stream)
    return PlanProblem(stream.blocks, range(3), parameters, 0.25, parameters)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "llama one group"])
def test_no_larger_set_can_be_removed(checkpoint_folder, name):
    """Against every subset of the candidates that leaves whole groups or equal ones."""
    wish = wish_of(checkpoint_folder, name)
    module = wish.blocks[0].modules[0]
    for similar in itertools.chain.from_iterable(itertools.combinations(range(6), n) for n in range(6)):
        least = wish.parameters.dense
        for gone in itertools.chain.from_iterable(itertools.combinations(similar, n) for n in range(len(similar) + 1)):
            left = [head // module.per_group for head in range(6) if head not in gone]
            kept = {left.count(group) for group in range(module.groups)}
            if len(kept) == 1 or kept == {0, module.per_group}:
                width = wide(len(set(left)), max(kept), wish.blocks[0].modules[-1].units)
                least = min(least, wish.parameters.total({0: width}))
        gone, width = loadable(wish, 0, similar)
        assert wish.parameters.total({0: width}) == least
        assert set(gone) <= set(similar)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("tau", [0.1, 0.2, 0.3])
def test_a_plan_of_similar_heads_is_exact(checkpoint_folder, name, tau):
    draw, pairs = random.Random(1), list(itertools.combinations(range(6), 2))
    distances = {index: table(6, {pair: draw.uniform(0.05, 0.4) for pair in pairs}) for index in range(3)}
    wish = wish_of(checkpoint_folder, name)
    similar, plan = similar_plan(wish, find_similar_heads(distances, tau))
    assert plan.lists_units
    before = after = 0.0
    for index, units in plan.units.items():
        gone, width = loadable(wish, index, candidates(distances[index], tau))
        assert similar.removed[index] == gone
        assert plan.widths[index] == width == width_of(wish.blocks[index], selected(**units))
        assert sorted((*units["heads"], *gone)) == list(range(6))
        before += wish.parameters.module_size(index, "heads", wish.blocks[index].width)
        after += wish.parameters.module_size(index, "heads", width)
    assert similar.share == pytest.approx(1 - after / before, abs=1e-12)


def test_thresholds_that_remove_nothing_or_all(checkpoint_folder):
    wish = wish_of(checkpoint_folder, "llama")
    distances = {0: table(6, {(0, 2): 0.11, (0, 1): 0.2, (1, 3): 0.3}, far=0.5)}
    # Each head of a chain is near the next one; only its ends are far apart, and still one head alone would stay.
    chain = {0: table(3, {(0, 1): 0.1, (1, 2): 0.1}, far=0.3)}
    # Head 0 is a candidate from 0.11 on, but its group leaves with head 1 only, which is like head 3.
    alone = find_similar_heads(distances, 0.15)
    found = "the distances between heads go from"
    for message, wanted in (
        (error_of(find_similar_heads, distances, 0.05), f"nothing: {found} 0.11 to 0.5; choose a tau above 0.11"),
        (error_of(find_similar_heads, distances, 0.6), f"single head: {found} 0.11 to 0.5; choose a tau below 0.5"),
        (error_of(find_similar_heads, chain, 0.2), f"a single head: {found} 0.1 to 0.3; choose a smaller tau"),
        (error_of(similar_plan, wish, alone), "its 1 similar heads are neither a whole KV group nor one"),
        (error_of(similar_plan, wish, alone), "go from 0.11 to 0.5; choose a larger tau"),
    ):
        assert wanted in message
    assert find_similar_heads({**chain, 1: table(3, {(0, 1): 0.1})}, 0.2).candidates == {0: (0, 1), 1: (0,)}
    similar, _ = similar_plan(wish, find_similar_heads(distances, 0.31))
    assert similar.removed == {0: (0, 1)}


def copied(name: str, folder: Path, pairs: list[tuple[int, int]], blocks: tuple[int, ...] = (0, 1, 2)) -> Path:
    """A row's checkpoint in which one head of each pair has the other one's queries, keys and values."""
    model = build(name)
    for index in blocks:
        layer, module = layers_of(model)[index], blocks_of(model)[index].modules[0]
        tensors = dict(layer.named_parameters())
        for slab, (to, source) in itertools.product(module.input_projections, pairs):
            part = tensors[slab.name].data.movedim(slab.axis, 0)
            part[entries(slab, [to])] = part[entries(slab, [source])]
    with quiet():
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", UNGROUPED)
def test_of_two_equal_heads_one_is_removed_without_loss(tmp_path, name):
    folder = copied(name, tmp_path / "model", [(1, 4), (3, 2)])
    dense, ids = load_written(folder), token_rows(4, seed=5)
    wanted = logits_of(dense, ids)
    stay = blocks_of(dense)[0].modules[-1].units
    # Rows enough for the final norm to be looked at.
    more = SIMILAR | {"samples": 64}
    summary = prune(folder, tmp_path / "out", tau=1e-4, ridge=0.0, blocks="1:", **more)
    assert summary.widths == dict.fromkeys((1, 2), wide(4, 1, stay))
    for block in record_of(tmp_path / "out")["blocks"]:
        # The lower index of each pair.
        assert block["heads"] == [0, 3, 4, 5]
        assert len(block["channels"]) == stay
    assert relative(logits_of(load_written(tmp_path / "out"), ids), wanted) < 1e-5
    # Without the refit much is lost.
    prune(folder, tmp_path / "cut", tau=1e-4, recovery="none", **SIMILAR)
    assert relative(logits_of(load_written(tmp_path / "cut"), ids), wanted) > 0.05


@pytest.mark.parametrize(
    ("criterion", "widths"), [("similarity+second-moment", "uniform"), ("similarity+surgeon", "adaptive")]
)
def test_similar_heads_then_the_lowest_scores(tmp_path, criterion, widths):
    """Heads go within a sparsity; the copies before all others, though their scores are the highest."""
    folder = copied("gpt2", tmp_path / "model", [(0, 1), (2, 3)])
    how = {"widths": widths, "sparsity": 0.4, "format": "hf", **SMALL}
    prune(folder, tmp_path / "out", criterion=criterion, tau=1e-4, **how)
    found = record_of(tmp_path / "out")
    assert found["sparsity"]["reached"] == pytest.approx(0.4, abs=0.005)
    assert [entry["candidates"] for entry in found["similarity"]["blocks"]] == [[0, 2]] * 3
    cut = 0
    for block in found["blocks"]:
        gone = set(range(6)) - set(block["heads"])
        cut += len(gone)
        assert gone >= {0, 2} if len(gone) >= 2 else gone <= {0, 2}
        assert len(block["channels"]) < 96
    assert cut


def test_a_pair_is_each_criterion_on_its_own_module(tmp_path, checkpoint_folder):
    """Weights alone decide here, so that no module sees what another one lost."""
    folder = checkpoint_folder("qwen2")
    plan = {"blocks": [{"block": i, "width": {"kv_groups": 2, "heads_per_group": 2, "channels": 40}} for i in range(3)]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    units = {}
    for name in ("l1", "random", "heads=l1,channels=random", "heads=random,channels=l1"):
        out = tmp_path / name
        prune(folder, out, plan=str(tmp_path / "plan.json"), criterion=name, recovery="none", **SMALL)
        units[name] = [(block["heads"], block["channels"]) for block in record_of(out)["blocks"]]
    assert units["l1"] != units["random"]
    for heads, channels in (("l1", "random"), ("random", "l1")):
        mixed = units[f"heads={heads},channels={channels}"]
        assert [one[0] for one in mixed] == [one[0] for one in units[heads]]
        assert [one[1] for one in mixed] == [one[1] for one in units[channels]]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"criterion": "similar"}, "criterion is 'similar'; it must be one of surgeon, flap-wifv"),
    ({"criterion": "similarity+similarity"}, "or similarity, similarity+X, or heads=X,channels=Y"),
    ({"criterion": "heads=l1"}, "write a criterion for each as heads=X,channels=Y"),
    ({"criterion": "heads=l1,channels=similarity", "tau": 0.1}, "the criterion of channels must be one of surgeon"),
    ({"criterion": "l1,experts=reap,experts=random"}, "the criterion of experts must be one of reroute, reap"),
    ({"criterion": "reap, experts=random"}, "reap and random are both for experts; name one"),
    ({"tau": 0.2}, "tau is an option of --criterion similarity: add that, or leave --tau out"),
    ({"criterion": "similarity"}, "similarity needs a threshold: add --tau, for example 0.19"),
    ({"criterion": "similarity", "tau": 0}, "tau is 0; it must be above 0 and at most ln 2 = 0.6931"),
    ({"criterion": "similarity", "tau": 0.2, "sparsity": 0.2}, "--tau and --sparsity both set how much to remove"),
    ({"criterion": "similarity", "tau": 0.2, "modules": ("channels",)}, "similarity compares heads: add heads to"),
    ({"criterion": "similarity", "tau": 0.2, "widths": "uniform"}, "but the stock format and --widths"),
    ({"criterion": "heads=similarity,channels=l1", "tau": 0.2}, "removes no channels: write heads=similarity+X"),
]


@pytest.mark.parametrize(("how", "message"), WRONG, ids=[str(row[0]) for row in WRONG])
def test_contradicting_options_are_refused(how, message):
    assert message in error_of(Options, **how)


def test_models_and_formats_without_fewer_heads(tmp_path, checkpoint_folder, monkeypatch):
    """Found before anything is measured."""
    monkeypatch.setattr(survey_model, "head_distances", lambda *_, **__: pytest.fail("heads were compared"))
    for name, out, more, message in (
        ("olmo2", "out", {}, "heads cannot be removed exactly, because its query and key norms run across all heads;"),
        ("gpt2", "out.gguf", {"format": "gguf"}, "the format cannot hold fewer heads"),
        ("llama", "out", {"dry_run": True}, "only a real run can find the number of similar heads, because it runs"),
    ):
        assert message in error_of(prune, checkpoint_folder(name), tmp_path / out, tau=0.2, **more, **SIMILAR)
    assert not list(tmp_path.iterdir())
