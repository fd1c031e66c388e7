"""Pruned folders in the newest transformers: caches, saving, dtypes, training and compilation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import QuantizedCache

from conftest import IDS, MIXTURE, apart, load, logits, train
from models import relative

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
PROMPT = 20


def test_generation_with_a_cache_equals_generation_without(folders, case):
    model = load(folders(case))
    plain = model.generate(IDS, use_cache=False, **GREEDY)
    for cache in ("dynamic", "static"):
        # Compilation is left out, since it would take long and show nothing more.
        assert torch.equal(model.generate(IDS, cache_implementation=cache, disable_compile=True, **GREEDY), plain)


def test_a_quantised_cache_keeps_logits_near(folders, case):
    model = load(folders(case))
    cache = QuantizedCache(backend="quanto", config=model.config, nbits=4)
    logits(model, IDS[:, :PROMPT], past_key_values=cache, use_cache=True)
    found, expected = logits(model, IDS[:, PROMPT:], past_key_values=cache, use_cache=True), logits(model)[:, PROMPT:]
    assert 0 < relative(found, expected) < 0.25


def test_saving_twice_changes_nothing(folders, case, tmp_path):
    model = load(folders(case))
    expected = logits(model)
    for name in ("once", "twice"):
        model.save_pretrained(tmp_path / name)
        model = load(tmp_path / name)
        assert torch.equal(logits(model), expected)


def test_every_device_map_and_bfloat16_compute_the_same(folders, case):
    expected = logits(load(folders(case)))
    for place in ("cpu", "auto"):
        assert torch.equal(logits(load(folders(case), device_map=place)), expected)
    half = load(folders(case), dtype="bfloat16")
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert apart(logits(half), expected) < 0.05


def test_gradient_checkpointing_gives_the_same_losses(folders, case):
    losses = []
    for checkpointing in (False, True):
        model = load(folders(case)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses += train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-5)
    assert losses[1] < losses[0]


def test_attention_weights_have_the_shape_of_each_layer(folders, case):
    """A layer without heads has attention weights of zero heads."""
    model = load(folders(case), attn_implementation="eager")
    attentions = [layer.self_attn for layer in model.model.layers]
    heads = [getattr(attention, "heads", attention.config.num_attention_heads) for attention in attentions]
    with torch.no_grad():
        found = model(IDS, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in found] == [(*IDS.shape[:1], n, *[IDS.shape[1]] * 2) for n in heads]


def test_no_new_graph_breaks(folders, case):
    def breaks(folder: Path) -> int:
        torch._dynamo.reset()
        return torch._dynamo.explain(load(folder))(IDS, use_cache=False).graph_break_count

    assert breaks(folders(case)) <= breaks(folders((case[0], "dense")))
    if case[0] != MIXTURE:
        # Dense mixtures break graphs too, as their experts run one at a time.
        model = load(folders(case))
        assert relative(logits(torch.compile(model, backend="aot_eager", fullgraph=True)), logits(model)) < 1e-5
