"""`trim` and `prune --vocabulary`: fewer tokens, and the same model on text of the kept scripts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from models import build, logits_of, relative, save
from outputs import Notes, assert_error, edit_json
from secateur import Options, RunOptions, open_checkpoint, prune, retrain, trim
from secateur.base.progress import Silent
from secateur.commands.sizes import sizes
from secateur.commands.survey import survey_page
from secateur.measure.loading import load
from secateur.report.summary import Trimmed
from secateur.retraining.teacher import open_teacher
from secateur.vocabulary import trim as trimming
from secateur.vocabulary.kept import read_map
from secateur.vocabulary.trim import _parameters
from secateur.write.record import MAP_FILE
from tiny_tokenizers import SENTENCES, save_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 901, "bos_token_id": 900, "eos_token_id": 900}
MORE_ROWS = {"llama trimmed": lambda: AutoConfig.for_model("llama", **SIZES)}
LATIN, CYRILLIC = (" ".join(SENTENCES[name]) for name in ("latin", "cyrillic"))
PYTORCH = {"format": "pt"}
PRUNE: dict[str, Any] = {"samples": 8, "length": 16, "sparsity": 0.4, "device": "cpu", "effort": "quick"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small Llama whose byte-level tokenizer was trained on eight scripts."""
    folder = save("llama trimmed", tmp_path_factory.mktemp("whole") / "model")
    end = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    file = str(save_tokenizer("gpt2", folder) / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=file, **end).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
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
    old, new = (AutoTokenizer.from_pretrained(folder).encode(text)[:60] for folder in (whole, cut))
    kept = read_map(cut)
    assert [kept[token] for token in new] == old
    networks = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (whole, cut)]
    before, after = (logits_of(one, torch.tensor([ids])) for one, ids in zip(networks, (old, new), strict=True))
    return after, before[..., kept]


def test_trim_prints_sizes_before_and_after(model, tmp_path, run):
    result = run("trim", str(model), str(tmp_path / "out"), "--vocabulary", "latin")
    before, after = (open_checkpoint(folder).config.vocab_size for folder in (model, tmp_path / "out"))
    row = [cell.strip() for line in result.out.splitlines() if " vocabulary " in line for cell in line.split("│")]
    assert row[2:5] == [f"{before:,}", f"{after:,}", f"{after / before:.3f}"]
    assert f"Written to {tmp_path / 'out'}" in "".join(result.out.splitlines())
    shutil.copytree(model, tmp_path / "other")
    for theta in (10_000.0, 5000.0):
        edit_json(tmp_path / "other" / "config.json", rope_theta=theta)
        trim(tmp_path / "other", tmp_path / "out", vocabulary="latin", overwrite=True)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == theta


def test_text_of_the_script_keeps_its_tokens_and_logits(model, latin):
    out, done = latin
    assert relative(*same_text(model, out, LATIN)) < 1e-6
    assert done.tokens[1] % 64 == 0
    assert done.tokens[1] < done.tokens[0]
    assert done.parameters[0] - done.parameters[1] == 2 * 32 * (done.tokens[0] - done.tokens[1])
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    wanted = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    assert config == config | wanted | {"vocab_size": done.tokens[1]}


def test_other_text_decodes_to_itself(latin):
    tokenizer = AutoTokenizer.from_pretrained(latin[0])
    for other in (CYRILLIC, "你好 🙂", "a\u0301\x00"):
        assert tokenizer.decode(tokenizer.encode(other, add_special_tokens=False)) == other


def test_pruning_a_trimmed_folder_and_trimming_while_pruning_write_the_same_weights(model, latin, text, tmp_path):
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
def test_a_pruned_folder_is_trimmed(model, text, tmp_path, widths):
    prune(model, tmp_path / "pruned", calibration=text, widths=widths, **PRUNE)
    trim(tmp_path / "pruned", tmp_path / "trimmed", vocabulary="latin")
    whole, cut = (open_checkpoint(tmp_path / name) for name in ("pruned", "trimmed"))
    kept = read_map(tmp_path / "trimmed")
    new = torch.arange(0, len(kept), 9)[None]
    networks = [load(one, torch.float32, torch.device("cpu")) for one in (whole, cut)]
    before = logits_of(networks[0], torch.tensor(kept)[new])[..., kept]
    assert relative(logits_of(networks[1], new), before) < 1e-6
    sizes = json.loads((tmp_path / "trimmed" / "secateur.json").read_text(encoding="utf-8"))["sizes"]
    assert sizes["parameters"][1] == sum(info.entries for info in cut.weights.values())
    assert sizes["bytes"][1] == cut.bytes
    prune(tmp_path / "pruned", tmp_path / "again", calibration=text, widths=widths, vocabulary="latin", **PRUNE)
    assert read_map(tmp_path / "again") == kept
    trim(tmp_path / "trimmed", tmp_path / "twice", vocabulary="75%", calibration=text, length=16)
    record = json.loads((tmp_path / "twice" / "secateur.json").read_text(encoding="utf-8"))
    twice = [901, len(read_map(tmp_path / "twice"))]
    assert record["sizes"]["vocabulary"] == record["vocabulary"]["tokens"] == twice
    removed = build("llama trimmed").get_input_embeddings().weight.shape[1] * (901 - twice[1])
    assert (record["vocabulary"]["parameters"], record["vocabulary"]["bits_per_byte"]) == (2 * removed, None)
    prune(tmp_path / "twice", tmp_path / "last", calibration=text, widths=widths, **PRUNE)
    card = (tmp_path / "last" / "README.md").read_text(encoding="utf-8")
    assert f", {twice[1]:,} of 901 tokens kept\n" in card
    commands = [line.split()[1:4] for line in card.splitlines() if line.startswith("secateur ")]
    named = [("prune", "model"), ("trim", "pruned"), ("trim", "trimmed"), ("prune", "twice")]
    assert commands == [[*one, "OUT"] for one in named]
    assert "| before the last step | after |" in card


def test_the_teacher_has_the_kept_tokens(model, latin, text, tmp_path):
    prune(model, tmp_path / "pruned", vocabulary="latin", calibration=text, **PRUNE)
    teacher = open_teacher(open_checkpoint(tmp_path / "pruned"), None, Silent())
    assert teacher.kept_tokens == tuple(read_map(tmp_path / "pruned"))
    retrain(tmp_path / "pruned", tmp_path / "healed", calibration=text, length=16, tokens="512", batch=4, device="cpu")
    assert (tmp_path / "healed" / MAP_FILE).is_file()
    prune(latin[0], tmp_path / "twice", vocabulary="75%", calibration=text, **PRUNE)
    teacher = open_teacher(open_checkpoint(tmp_path / "twice"), None, Silent())
    kept = read_map(latin[0])
    assert [kept[token] for token in teacher.kept_tokens] == read_map(tmp_path / "twice")


def test_tokens_and_blocks_meet_a_target_together(model, latin, tmp_path):
    options: dict[str, Any] = {name: value for name, value in PRUNE.items() if name != "sparsity"}
    options |= {"calibration": "random", "vocabulary": "latin"}
    whole, cut = latin[1].parameters
    share = f"params={100 * cut / whole - 5:.1f}%"
    done = prune(model, tmp_path / "out", target=share, **options)
    assert cut > done.parameters[1] > 0.8 * cut
    assert done.parameters[1] <= float(share[7:-1]) / 100 * whole
    said = r"needs no block to be pruned.*use secateur trim"
    assert_error(said, prune, model, tmp_path / "other", target="params=99%", **options)


def test_sizes_with_fewer_tokens_have_a_note_about_perplexity(model, text, tmp_path):
    notes, how = Notes(), {name: value for name, value in PRUNE.items() if name != "device"}
    each = [Options(**how, vocabulary="latin", calibration=text)]
    sizes(model, tmp_path / "sizes", each, RunOptions(device="cpu"), texts=[text], tokens=64, watcher=notes)
    assert any("but not with the dense model's" in note for note in notes.said)


def test_a_survey_of_fewer_tokens_is_for_them_alone(model, latin, text, tmp_path):
    options = {name: value for name, value in PRUNE.items() if name in ("samples", "length")} | {"calibration": text}
    survey_page(model, tmp_path / "survey", Options(vocabulary="latin", **options), RunOptions(device="cpu"))
    page = (tmp_path / "survey" / "survey.html").read_text(encoding="utf-8")
    assert f"Keeping {latin[1].tokens[1]} of" in page
    assert "--vocabulary latin" in page
    survey = tmp_path / "survey" / "survey.json"
    prune(model, tmp_path / "out", survey=survey, vocabulary="latin", calibration=text, **PRUNE)
    said = "a survey of other calibration rows"
    assert_error(said, prune, model, tmp_path / "other", survey=survey, calibration=text, **PRUNE)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ("all", "cuts no tokens"),
        ("klingon", "no Unicode script 'klingon'.*latin"),
        ("lat1n", "write all, scripts such as latin"),
        ("text:0", "write all, scripts such as latin"),
        ("0%", "write all, scripts such as latin"),
        ("100%", "write all, scripts such as latin"),
        ("1.2.3", "write all, scripts such as latin"),
        ("10", "too few"),
        ("1M", "keeps all tokens"),
    ],
)
def test_wrong_vocabularies_are_refused(model, text, tmp_path, vocabulary, message):
    assert_error(message, trim, model, tmp_path / "out", vocabulary=vocabulary, calibration=text, length=16)
    assert not (tmp_path / "out").exists()


def test_trim_refuses_what_it_cannot_do(model, latin, tmp_path, monkeypatch):
    (tmp_path / "short.txt").write_text(LATIN, encoding="utf-8")
    said = r"short.txt: too short, a tenth of it is set aside.* must fill a row of 30; give a longer text"
    how: dict[str, Any] = {"vocabulary": "text", "calibration": str(tmp_path / "short.txt")}
    assert_error(said, trim, model, tmp_path / "out", length=30, **how)
    assert_error("length is 1; it must", trim, model, tmp_path / "out", length=1, **how)
    assert_error("length is 1000000, but the model has only", trim, model, tmp_path / "out", length=10**6, **how)
    (tmp_path / "out").touch()
    with monkeypatch.context() as patch:
        patch.setattr(trimming, "with_vocabulary", lambda *_, **__: pytest.fail("refused only after slow work"))
        assert_error("a file with this name exists", trim, model, tmp_path / "out", vocabulary="latin")
    (tmp_path / "out").unlink()
    assert_error(r"trim writes a folder.*secateur export", trim, model, tmp_path / "out.gguf", vocabulary="latin")
    said = "keeps all tokens, so there is nothing to trim"
    assert_error(said, trim, latin[0], tmp_path / "out", vocabulary="latin")
    said = "counts the tokens of the calibration text, but --calibration is random"
    assert_error(said, prune, model, tmp_path / "out", Options(vocabulary="text", calibration="random"))
    biased = changed_model(model, tmp_path / "biased", sequence_bias=[[[5], 1.0]])
    assert_error(r"cannot be cut: config\.json has sequence_bias", trim, biased, tmp_path / "out", vocabulary="latin")
    shutil.copytree(latin[0], tmp_path / "cut")
    for ids, said in {"[3, 1]": "not a map of token ids.*ascending", "[1, 3]": "has 2 token ids, but the mo"}.items():
        (tmp_path / "cut" / MAP_FILE).write_text(f'{{"original_ids": {ids}}}', encoding="utf-8")
        assert_error(said, trim, tmp_path / "cut", tmp_path / "out", vocabulary="latin")
    (tmp_path / "cut" / MAP_FILE).unlink()
    (tmp_path / "cut" / "secateur.json").write_text('{"sizes": {"bytes": [1]}}')
    assert_error("not a record that secateur prune wrote", trim, tmp_path / "cut", tmp_path / "out", vocabulary="latin")


def changed_model(model: Path, folder: Path, **keys: Any) -> Path:
    """Return a copy of the model with other values in config.json; None removes a key."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text()) | keys
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def test_config_json_is_written_with_corrections(model, tmp_path):
    """config.json may leave the number of tokens to its class, and name tied tensors or blocks that there are not."""
    more = changed_model(model, tmp_path / "more", num_nextn_predict_layers=1, tie_word_embeddings=True)
    tensors = weights(more)
    save_file(tensors | {"model.layers.2.eh_proj.weight": torch.zeros(32, 64)}, more / "model.safetensors", PYTORCH)
    trim(more, tmp_path / "out", vocabulary="latin")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_nextn_predict_layers"], config["tie_word_embeddings"]) == (0, False)
    without = changed_model(model, tmp_path / "without", vocab_size=None)
    rows = {name: torch.zeros(32_000, 32) for name, value in tensors.items() if len(value) == 901}
    save_file(tensors | rows, without / "model.safetensors", PYTORCH)
    done = trim(without, tmp_path / "small", vocabulary="latin")
    assert json.loads((tmp_path / "small" / "config.json").read_text())["vocab_size"] == done.tokens[1]


def test_changed_files_beside_the_weights_are_read_again(model, tmp_path):
    """Copies with new token ids are kept in the cache of the user."""
    folder = changed_model(model, tmp_path / "model", use_cache=True)
    (folder / "additional_chat_templates").mkdir()
    template = folder / "additional_chat_templates" / "rag.jinja"
    for number, used in enumerate((True, False)):
        template.write_text("b" * (number + 1))
        edit_json(folder / "config.json", use_cache=used)
        out = tmp_path / str(number)
        trim(folder, out, vocabulary="latin")
        assert json.loads((out / "config.json").read_text())["use_cache"] is used
        assert (out / "additional_chat_templates" / "rag.jinja").read_text() == template.read_text()


def test_stored_buffers_are_no_parameters(checkpoint_folder):
    whole = build("deepseek_v3")
    assert sum(value.numel() for value in whole.parameters()) == _parameters(
        open_checkpoint(checkpoint_folder("deepseek_v3"))
    )
