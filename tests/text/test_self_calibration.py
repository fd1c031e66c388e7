"""Rows that a model generates: its own distribution, whatever the checkpoint's settings are, and errors of one line."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from models import BOS, EOS, VOCAB, build, logits_of, make_tokenizer
from outputs import assert_error, edit_json
from secateur import open_checkpoint, prune
from secateur.text import draw
from secateur.text.self_calibration import BATCH_ROWS, opening_token, self_rows

NAMES = ["llama", "llama biased", "llama tied", "gpt2", "gpt2 scaled", "opt", "qwen2", "gemma2", "gpt_neox"]
"""Names of models; a name of two words has a tokenizer that begins texts with BOS."""


def written(folder: Path, samples: int = 4, length: int = 12, **how: Any) -> Tensor:
    checkpoint = open_checkpoint(folder)
    return self_rows(checkpoint, checkpoint.tokenizer(), samples=samples, length=length, **({"seed": 0} | how))


def by_hand(name: str, known: int, samples: int, length: int, seed: int) -> Tensor:
    """Token by token without a cache: EOS and ids that the tokenizer does not know are never drawn."""
    model, kept = build(name), int(" " in name)
    torch.manual_seed(seed)
    rows = []
    for start in range(0, samples, BATCH_ROWS):
        ids = torch.full((min(BATCH_ROWS, samples - start), 1), BOS)
        for _ in range(length - kept):
            logits = logits_of(model, ids)[:, -1]
            logits[:, EOS] = logits[:, known:] = -torch.inf
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
        rows.append(ids[:, 1 - kept :])
    return torch.cat(rows)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_drawn_from_the_models_own_distribution(checkpoint_folder, name):
    rows = written(checkpoint_folder(name), BATCH_ROWS + 4, 12, seed=3)
    assert rows.dtype == torch.int64
    known = len(open_checkpoint(checkpoint_folder(name)).tokenizer())
    with torch.random.fork_rng():
        assert torch.equal(rows, by_hand(name, known, BATCH_ROWS + 4, 12, 3))


def test_generation_settings_of_the_checkpoint_are_ignored(checkpoint_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_folder("llama"), folder)
    wanted = written(folder)
    settings = {"do_sample": True, "top_k": 1, "top_p": 0.1, "temperature": 9.0, "repetition_penalty": 5.0}
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": EOS, "max_length": 3}))
    assert torch.equal(written(folder), wanted)


def names(bos: int | None, eos: int | None, **config: Any) -> tuple[Any, Any]:
    checkpoint = SimpleNamespace(source="model", raw_config=config, config=SimpleNamespace(vocab_size=VOCAB))
    return checkpoint, SimpleNamespace(bos_token_id=bos, eos_token_id=eos)


def test_the_token_that_opens_a_text():
    assert opening_token(*names(5, 6)) == 5
    assert opening_token(*names(None, 6, bos_token_id=7)) == 7
    assert opening_token(*names(None, 6)) == 6
    assert opening_token(*names(None, None, eos_token_id=[8, 9])) == 8
    # An id that the model does not have is none.
    assert opening_token(*names(VOCAB, 6)) == 6
    assert_error("model: no BOS or EOS token, with which generated text must begin", opening_token, *names(None, None))


SIZE: dict[str, Any] = {"samples": 4, "length": 16, "sparsity": 0.3}


def test_a_model_without_bos_and_eos_is_refused(checkpoint_folder, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_folder("gpt2"), folder)
    tokenizer = make_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    edit_json(folder / "config.json", bos_token_id=None, eos_token_id=None)
    monkeypatch.setattr(draw, "self_rows", lambda *_, **__: pytest.fail("the model was run"))
    assert_error("no BOS or EOS token", prune, folder, tmp_path / "out", calibration="self", **SIZE)


def test_damaged_weights_are_an_error(checkpoint_folder, tmp_path):
    model = build("llama")
    model.lm_head.weight[0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    assert_error(r"could not write its own text .*; calibrate on a text, or on random", written, tmp_path / "model")
