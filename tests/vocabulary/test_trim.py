"""`trim` and `prune --vocabulary`: fewer tokens, and the same model on text of the kept scripts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models import logits_of, relative
from secateur.base.errors import SecateurError
from secateur.base.progress import Silent
from secateur.base.quiet import quiet
from secateur.commands.options import Options, RunOptions
from secateur.commands.prune import prune
from secateur.commands.survey import survey_page
from secateur.commands.trim import trim
from secateur.measure.loading import load
from secateur.model.checkpoint import open_checkpoint
from secateur.report.summary import Trimmed
from secateur.retraining.retrain import retrain
from secateur.retraining.teacher import open_teacher
from secateur.vocabulary.map_file import MAP_FILE, read_map

LATIN = "The tide comes in at four, and the boats leave the harbour at five. “Nothing is lost”, she said: 12 + 7 = 19. "
CYRILLIC = (
    "Вода приходит в четыре часа, и лодки выходят из гавани в пять. Ничего не потеряно, сказала она, когда над берегом "
    "поднялось солнце и рыбаки вернулись домой с уловом. "
)
PRUNE: dict[str, Any] = {"samples": 8, "length": 16, "sparsity": 0.4, "device": "cpu", "effort": "quick"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small Llama whose byte-level tokenizer was trained on Latin and Cyrillic text."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([LATIN, CYRILLIC] * 40, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        **sizes,
    )
    with quiet():
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(LATIN * 60, encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def latin(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trimmed]:
    out = tmp_path_factory.mktemp("latin") / "trimmed"
    return out, trim(model, out, vocabulary="latin")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_text(whole: Path, cut: Path, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of both folders for a text, at the tokens that both have."""
    old, new = (AutoTokenizer.from_pretrained(folder).encode(text) for folder in (whole, cut))
    kept = read_map(cut)
    assert kept is not None
    assert [kept[token] for token in new] == old
    networks = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (whole, cut)]
    before, after = (logits_of(one, torch.tensor([ids])) for one, ids in zip(networks, (old, new), strict=True))
    return after, before[..., kept]


def test_text_of_the_script_keeps_its_tokens_and_logits(model: Path, latin: tuple[Path, Trimmed]) -> None:
    out, done = latin
    assert relative(*same_text(model, out, LATIN)) < 1e-6
    assert done.tokens[1] % 64 == 0
    assert done.tokens[1] < done.tokens[0]
    assert done.parameters[0] - done.parameters[1] == 2 * 32 * (done.tokens[0] - done.tokens[1])


def test_other_text_decodes_to_itself(latin: tuple[Path, Trimmed]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(latin[0])
    for other in (CYRILLIC, "你好 🙂", "a\u0301\x00"):
        assert tokenizer.decode(tokenizer.encode(other)) == other


def test_ids_in_configs_are_renumbered(latin: tuple[Path, Trimmed]) -> None:
    config = json.loads((latin[0] / "config.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(latin[0])
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert config["vocab_size"] == latin[1].tokens[1]


def test_pruning_a_trimmed_folder_and_trimming_while_pruning_write_the_same_weights(
    model: Path, latin: tuple[Path, Trimmed], text: str, tmp_path: Path
) -> None:
    prune(latin[0], tmp_path / "after", calibration=text, **PRUNE)
    done = prune(model, tmp_path / "at-once", vocabulary="latin", calibration=text, **PRUNE)
    after, at_once = weights(tmp_path / "after"), weights(tmp_path / "at-once")
    assert after.keys() == at_once.keys()
    assert all(torch.equal(after[name], at_once[name]) for name in after)
    assert done.vocabulary == latin[1].tokens
    assert done.parameters[0] == latin[1].parameters[0]
    assert read_map(tmp_path / "at-once") == read_map(tmp_path / "after") == read_map(latin[0])
    assert "vocabulary.json" in (tmp_path / "at-once" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("widths", ["adaptive", "uniform"])
def test_a_pruned_folder_is_trimmed(model: Path, text: str, tmp_path: Path, widths: str) -> None:
    prune(model, tmp_path / "pruned", calibration=text, widths=widths, **PRUNE)
    trim(tmp_path / "pruned", tmp_path / "trimmed", vocabulary="latin")
    whole, cut = (open_checkpoint(tmp_path / name) for name in ("pruned", "trimmed"))
    kept = read_map(tmp_path / "trimmed")
    assert kept is not None
    new = torch.arange(0, len(kept), 9)[None]
    before = logits_of(load(whole, torch.float32, torch.device("cpu")), torch.tensor(kept)[new])[..., kept]
    assert relative(logits_of(load(cut, torch.float32, torch.device("cpu")), new), before) < 1e-6
    record = json.loads((tmp_path / "trimmed" / "secateur.json").read_text(encoding="utf-8"))
    assert record["sizes"]["parameters"][1] == sum(info.entries for info in cut.weights.values())
    assert record["sizes"]["bytes"][1] == cut.bytes
    prune(tmp_path / "pruned", tmp_path / "again", calibration=text, widths=widths, vocabulary="latin", **PRUNE)
    assert read_map(tmp_path / "again") == kept


def test_trimming_twice_maps_to_the_original_model(
    model: Path, latin: tuple[Path, Trimmed], text: str, tmp_path: Path
) -> None:
    trim(latin[0], tmp_path / "again", vocabulary="75%", calibration=text, length=16)
    first, again = read_map(latin[0]), read_map(tmp_path / "again")
    assert first is not None
    assert again is not None
    assert set(again) < set(first)
    before, after = weights(model), weights(tmp_path / "again")
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"][again])


def test_the_teacher_has_the_kept_tokens(model: Path, text: str, tmp_path: Path) -> None:
    prune(model, tmp_path / "pruned", vocabulary="latin", calibration=text, **PRUNE)
    teacher = open_teacher(open_checkpoint(tmp_path / "pruned"), None, Silent())
    assert teacher is not None
    assert teacher.kept_tokens == tuple(read_map(tmp_path / "pruned") or ())
    retrain(tmp_path / "pruned", tmp_path / "healed", calibration=text, length=16, tokens="512", batch=4, device="cpu")
    assert (tmp_path / "healed" / MAP_FILE).is_file()


def test_tokens_of_the_text_have_a_price(model: Path, text: str, tmp_path: Path) -> None:
    done = trim(model, tmp_path / "out", vocabulary="text", calibration=text, length=16)
    assert done.bits_per_byte is not None
    # The rest of the text has no other words than the counted part.
    assert done.bits_per_byte[1] == pytest.approx(done.bits_per_byte[0], rel=0.2)
    assert relative(*same_text(model, tmp_path / "out", LATIN)) < 1e-6


def test_tokens_and_blocks_meet_a_target_together(model: Path, latin: tuple[Path, Trimmed], tmp_path: Path) -> None:
    options: dict[str, Any] = {name: value for name, value in PRUNE.items() if name != "sparsity"}
    options |= {"calibration": "random", "vocabulary": "latin"}
    whole, cut = latin[1].parameters
    share = f"params={100 * cut / whole - 5:.1f}%"
    done = prune(model, tmp_path / "out", target=share, **options)
    assert cut > done.parameters[1] > 0.8 * cut
    assert done.parameters[1] <= float(share[7:-1]) / 100 * whole
    with pytest.raises(SecateurError, match=r"needs no block to be pruned.*use secateur trim"):
        prune(model, tmp_path / "other", target="params=99%", **options)


def test_the_cheapest_number_of_tokens_is_kept(model: Path, text: str, tmp_path: Path) -> None:
    options = {name: value for name, value in PRUNE.items() if name != "sparsity"}
    target = {"vocabulary": "auto", "target": "params=60%", "calibration": text}
    done = prune(model, tmp_path / "out", **target, **options)
    record = json.loads((tmp_path / "out" / "secateur.json").read_text(encoding="utf-8"))["vocabulary"]
    choices = {one["tokens"]: one for one in record["choices"]}
    loss = {
        tokens: math.log(2) * (one["bits_per_byte"] - one["bits_before"]) + one["blocks"]
        for tokens, one in choices.items()
    }
    most, fewest = max(choices), min(choices)
    # The scripts' tokens are free, so that blocks pay for all; fewer tokens leave less to blocks.
    assert choices[most]["bits_per_byte"] == pytest.approx(choices[most]["bits_before"], rel=0.05)
    assert choices[most]["blocks"] > choices[fewest]["blocks"]
    assert done.vocabulary is not None
    assert done.vocabulary[1] == min(loss, key=lambda tokens: loss[tokens])
    assert done.parameters[1] <= 0.6 * done.parameters[0]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) <= done.vocabulary[1]
    with pytest.raises(SecateurError, match="vocabulary auto needs a target for the whole model"):
        trim(model, tmp_path / "other", vocabulary="auto")


def test_a_survey_of_fewer_tokens_is_for_them_alone(model: Path, text: str, tmp_path: Path) -> None:
    options = {name: value for name, value in PRUNE.items() if name in ("samples", "length")} | {"calibration": text}
    survey_page(model, tmp_path / "survey", Options(vocabulary="latin", **options), RunOptions(device="cpu"))
    page = (tmp_path / "survey" / "survey.html").read_text(encoding="utf-8")
    assert "Keeping 384 of" in page
    assert "--vocabulary latin" in page
    survey = tmp_path / "survey" / "survey.json"
    prune(model, tmp_path / "out", survey=survey, vocabulary="latin", calibration=text, **PRUNE)
    with pytest.raises(SecateurError, match="a survey of other calibration rows"):
        prune(model, tmp_path / "other", survey=survey, calibration=text, **PRUNE)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ("all", "cuts no tokens"),
        ("klingon", "no Unicode script 'klingon'.*latin"),
        ("lat1n", "write all, scripts such as latin"),
        ("text:0", "write all, scripts such as latin"),
        ("100%", "write all, scripts such as latin"),
        ("0", "write all, scripts such as latin"),
        ("1.2.3", "write all, scripts such as latin"),
        ("10", "too few"),
        ("1M", "keeps all tokens"),
    ],
)
def test_wrong_vocabularies_are_refused(model: Path, text: str, tmp_path: Path, vocabulary: str, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        trim(model, tmp_path / "out", vocabulary=vocabulary, calibration=text, length=16)
    assert not (tmp_path / "out").exists()


def test_trim_refuses_what_it_cannot_do(model: Path, latin: tuple[Path, Trimmed], tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=r"trim writes a folder.*secateur export"):
        trim(model, tmp_path / "out.gguf", vocabulary="latin")
    with pytest.raises(SecateurError, match="keeps all tokens, so there is nothing to trim"):
        trim(latin[0], tmp_path / "out", vocabulary="latin")
    with pytest.raises(SecateurError, match="counts the tokens of the calibration text, but --calibration is random"):
        prune(model, tmp_path / "out", Options(vocabulary="text", calibration="random"))
    (tmp_path / MAP_FILE).write_text('{"original_ids": [3, 1]}', encoding="utf-8")
    with pytest.raises(SecateurError, match=r"not a map of token ids.*ascending"):
        read_map(tmp_path)
