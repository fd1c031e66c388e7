"""Perplexity against a plain computation, and speed by its bookkeeping: no test depends on timings."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from models import make_letters
from outputs import Notes, edited_weights, error_of
from secateur import prune
from secateur.measure import evaluation, perplexity, speeds
from secateur.measure.evaluation import evaluate

VOCAB = 128
DOWN = "model.layers.1.mlp.down_proj.weight"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON: dict[str, Any] = {"vocab_size": VOCAB, "initializer_range": 0.3}


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = SIZES | COMMON | {"num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**(config | more))).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **COMMON)).eval()


def gemma2() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, **COMMON, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0)
    return Gemma2ForCausalLM(config).eval()


def random_rows(rows: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def plain_nll(model: PreTrainedModel, rows: torch.Tensor) -> float:
    """Row by row, token by token, in float64."""
    losses = []
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=row[None]).logits[0].double()
            losses += [float(cross_entropy(logits[i], row[i + 1])) for i in range(len(row) - 1)]
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("build", [llama, gpt2, gemma2])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_perplexity_is_that_of_a_plain_computation(build, batch):
    model, rows = build(), random_rows(7, 12)
    result = perplexity(model, rows, batch=batch)
    assert result.nll == pytest.approx(plain_nll(model, rows), rel=1e-6)
    assert result.nll > 1.05 * math.log(VOCAB) or build is gemma2  # far from uniform, so errors would show
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert (result.tokens, result.rows, result.length) == (7 * 11, 7, 12)


@pytest.mark.parametrize("logits", [1, 3 * VOCAB, 5 * VOCAB + 1])
def test_pieces_do_not_change_the_loss(monkeypatch, logits):
    module, shapes = sys.modules[perplexity.__module__], list[int]()
    model, rows = llama(), random_rows(4, 12)
    monkeypatch.setattr(module, "_LOSS_LOGITS", logits)
    monkeypatch.setattr(module, "_FORWARD_LOGITS", 2 * 12 * VOCAB)
    model.register_forward_pre_hook(lambda _, __, given: shapes.append(given["input_ids"].shape[0]), with_kwargs=True)
    assert perplexity(model, rows, batch=8).nll == pytest.approx(plain_nll(llama(), rows), rel=1e-6)
    assert shapes == [2, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: perplexity(llama(), random_rows(2, 1)), "2 rows of 1 tokens leave nothing to score"),
        (lambda: perplexity(llama(), random_rows(0, 4)), "0 rows of 4 tokens leave nothing to score"),
        (lambda: perplexity(llama(), random_rows(2, 4), batch=0), "batch is 0"),
        (lambda: perplexity(llama(), random_rows(2, 4) + VOCAB), f"ids outside the vocabulary of {VOCAB}; use"),
        (lambda: speeds([llama()], prompt=0), "prompt is 0"),
        (lambda: speeds([llama()], new=0), "new is 0"),
        (lambda: speeds([llama()], batch=0), "batch is 0"),
        (lambda: speeds([llama()], repeats=0), "repeats is 0"),
        (lambda: speeds([llama()], prompt=60, new=5), "prompt of 60 tokens and 5 new tokens exceed the model's 64"),
    ],
)
def test_bad_rows_and_sizes_are_named(call, message):
    assert message in error_of(call)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error_and_an_infinite_perplexity_is_none(value):
    model, rows = llama(), random_rows(4, 6) % 100
    rows[2, 0] = 101
    model.get_input_embeddings().weight.data[101] = value
    assert "loss is nan in rows 2 to 3" in error_of(perplexity, model, rows, batch=2)
    hopeless = llama()
    hopeless.lm_head.weight.data.mul_(1e4)
    assert math.isfinite(perplexity(hopeless, rows).nll)
    assert perplexity(hopeless, rows).perplexity == math.inf


@pytest.mark.parametrize("build", [llama, gpt2])
def test_speed_counts_its_tokens(build):
    """All positions may be used, and generation settings of the checkpoint are not."""
    model, lengths = build(), list[Any]()
    before = GenerationConfig(do_sample=True, temperature=0.5, num_beams=2, eos_token_id=list(range(99)))
    model.generation_config = before
    model.register_forward_pre_hook(lambda _, __, given: lengths.append((*given["input_ids"].shape,)), with_kwargs=True)
    (result,) = speeds([model.train()], prompt=59, new=5, batch=2, repeats=3)
    # One run to warm up and three that count: the prompt, then one token at a time out of the cache.
    assert lengths == 4 * [(2, 59), *(5 * [(2, 1)])]
    assert (result.prompt, result.new, result.batch, result.device, result.dtype) == (59, 5, 2, "cpu", "float32")
    rates = ((59, result.prefill, result.prefill_seconds), (5, result.decode, result.decode_seconds))
    for tokens, rate, seconds in rates:
        assert len(seconds) == 3
        assert min(seconds) > 0
        assert rate == pytest.approx(2 * tokens / sorted(seconds)[1])
    assert model.generation_config is before
    assert model.training


def test_times_come_from_the_clock(monkeypatch):
    ticks = iter(float(2**i) for i in range(1000))
    monkeypatch.setattr(sys.modules[speeds.__module__], "clock", lambda _: next(ticks))
    (result,) = speeds([llama()], prompt=4, new=2, repeats=1)
    # Marks of the counted run: start 2^4, first token 2^5, then 2^6 and 2^7.
    assert result.prefill_seconds == (16.0,)
    assert result.decode_seconds == (96.0,)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{i * i % 100}" for i in range(400)))
    return str(path)


def test_a_model_is_scored_as_transformers_loads_it(checkpoint_folder, text):
    folder = checkpoint_folder("llama")
    (score,) = evaluate(str(folder), texts=[text], length=20, tokens=100).models
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = torch.tensor([4 + i * i % 100 for i in range(100)]).view(5, 20)
    (found,) = score.texts.values()
    assert found.perplexity == pytest.approx(math.exp(plain_nll(model, rows)), rel=1e-5)
    assert (list(score.texts), found.tokens, found.rows, found.length) == ([text], 95, 5, 20)
    assert score.parameters == sum(p.numel() for p in model.parameters())
    assert score.bytes == 4 * score.parameters
    assert not score.begins_with_bos


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: {}, "tensors missing from the weights: model.layers.1.mlp.down_proj.weight"),
        (lambda tensor: {DOWN: tensor[:, 1:].contiguous()}, "is [48, 71], but config.json makes it [48, 72]; find the"),
    ],
)
def test_weights_are_never_drawn_at_random(checkpoint_folder, text, tmp_path, change, message):
    folder = shutil.copytree(checkpoint_folder("llama"), tmp_path / "model")
    with edited_weights(folder) as tensors:
        tensors |= change(tensors.pop(DOWN))
    assert message in error_of(evaluate, str(folder), texts=[text], length=20, tokens=100)


def test_two_models_are_compared(checkpoint_folder, text):
    small, dense = str(checkpoint_folder("llama tied")), str(checkpoint_folder("llama biased"))
    result = evaluate(small, against=dense, texts=[text, text], length=20, speed=True)
    figures = {figure.label: figure for figure in result.figures()}
    first, second = result.models
    assert [model.name for model in result.models] == [small, dense]
    names = "parameters, bytes in float32, perplexity words.txt, bits per byte words.txt"
    assert ", ".join(figures) == f"{names}, prefill tokens/s, decoding tokens/s"

    assert figures["parameters"].values == [first.parameters, second.parameters]
    assert figures["parameters"].ratio == first.parameters / second.parameters < 1
    assert figures["perplexity words.txt"].values == [m.texts[text].perplexity for m in result.models]
    turns = zip(second.speed.prefill_seconds, first.speed.prefill_seconds, strict=True)
    assert figures["prefill tokens/s"].ratio == sorted(b / a for b, a in turns)[1]
    assert figures["prefill tokens/s"].values == [first.speed.prefill, second.speed.prefill]
    assert json.loads(json.dumps(result.as_dict()))["models"][1]["texts"][text]["tokens"] == second.texts[text].tokens


def test_different_tokenizers_get_a_note(checkpoint_folder, text, tmp_path):
    """Perplexities per token of different tokenizers do not compare; with one tokenizer there is no note."""
    notes = Notes()
    folder, other = str(checkpoint_folder("llama")), tmp_path / "other"
    evaluate(folder, against=folder, texts=[text], length=20, watcher=notes)
    assert notes.said == []
    shutil.copytree(folder, other)
    make_letters().save_pretrained(other)
    evaluate(folder, against=str(other), texts=[text], length=20, watcher=notes)
    assert notes.said == [
        "The two models tokenise texts differently: their perplexities are per token, so they cannot be compared; "
        "their bits per byte can"
    ]


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_does_not_fit_is_read_as_it_runs(checkpoint_folder, text, tmp_path, monkeypatch, pruned, dtype):
    folder = checkpoint_folder("llama biased")
    if pruned:
        prune(folder, tmp_path / "pruned", calibration="random", samples=4, length=16, effort="quick")
        folder = tmp_path / "pruned"
    how: dict[str, Any] = {"texts": [text], "length": 12, "device": "cpu", "dtype": dtype}
    devices, load = list[str](), evaluation.load

    def noted(*given: Any, **named: Any) -> Any:
        network = load(*given, **named)
        devices.extend({parameter.device.type for parameter in network.parameters()})
        return network

    monkeypatch.setattr(evaluation, "load", noted)
    narrow, roomy = (evaluate(str(folder), **how, memory=memory).models[0] for memory in ("1B", "100GB"))
    assert devices == ["meta", "cpu"]
    assert narrow == roomy
