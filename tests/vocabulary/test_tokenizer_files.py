"""Ids in the files of a tokenizer and in configs, and tokenizers that cannot be cut."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from outputs import assert_error, edit_json
from secateur.vocabulary.kept import KeptTokens
from secateur.vocabulary.models import Bpe
from secateur.vocabulary.selection import select
from secateur.vocabulary.side_files import write_tokenizer
from secateur.vocabulary.token_ids import change_ids, fixed_ids, ids_in, resize_vocabulary
from secateur.vocabulary.tokenizer import StoredTokenizer, read_tokenizer
from secateur.vocabulary.wanted import Wanted
from tiny_tokenizers import KINDS, SENTENCES, save_tokenizer


def edit(folder: Path, **changes: Any) -> Path:
    """Change entries of the tokenizer.json in a folder."""
    edit_json(folder / "tokenizer.json", **changes)
    return folder


def latin(tokenizer: StoredTokenizer, **options: Any) -> KeptTokens:
    usual = {"rows": tokenizer.size, "wanted": Wanted(scripts="latin"), "counts": {}, "multiple": 1}
    return select(tokenizer, **usual | options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_of_transformers(kind, tmp_path):
    """Transformers opens the cut files, with the old special tokens under new ids."""
    backend = Tokenizer.from_file(str(save_tokenizer(kind, tmp_path / "plain") / "tokenizer.json"))
    names = [backend.id_to_token(token) for token in sorted(backend.get_added_tokens_decoder())]
    full = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=names[-1], pad_token=names[0])
    full.save_pretrained(tmp_path / "full")
    (tmp_path / "full" / "added_tokens.json").write_text(json.dumps({names[-1]: full.eos_token_id}))
    (tmp_path / "cut").mkdir()
    kept, _ = cut_latin(read_tokenizer(tmp_path / "full"), tmp_path / "cut")
    small = AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert len(small) == len(kept.ids) < len(full)
    special = kept.new_ids[full.eos_token_id], kept.new_ids[full.pad_token_id]
    assert (small.eos_token_id, small.pad_token_id) == special
    assert json.loads((tmp_path / "cut" / "added_tokens.json").read_text()) == {names[-1]: small.eos_token_id}
    for text in SENTENCES["latin"]:
        assert small(text)["input_ids"] == [kept.new_ids[token] for token in full(text)["input_ids"]]


def opened(kind: str, folder: Path) -> StoredTokenizer:
    return read_tokenizer(save_tokenizer(kind, folder))


def cut_latin(stored: StoredTokenizer, folder: Path, **options: Any) -> tuple[KeptTokens, Tokenizer]:
    """Write the tokenizer with the tokens of Latin text, and open it."""
    kept = latin(stored, **options)
    write_tokenizer(stored, kept, folder)
    return kept, Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("kind", KINDS)
def test_only_ids_change(kind, tmp_path):
    stored = opened(kind, tmp_path)
    cut_latin(stored, tmp_path)
    edited = json.loads((tmp_path / "tokenizer.json").read_text())
    assert edited.keys() == stored.contents.keys()
    for part, ids in (
        (lambda whole: whole, {"model", "added_tokens", "post_processor", "padding"}),
        (lambda whole: whole["model"], {"vocab", "merges", "unk_id"}),
    ):
        found, wanted = part(edited), part(stored.contents)
        assert all(found[key] == wanted[key] for key in found.keys() - ids)


def test_ids_of_padding_and_listed_tokens(tmp_path):
    decoder = {"content": "<|endoftext|>", "special": True}
    number = KINDS["qwen"]().token_to_id("<|endoftext|>")
    save_tokenizer("qwen", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {str(number): decoder}}))
    kept, small = cut_latin(read_tokenizer(tmp_path), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config == {"added_tokens_decoder": {str(kept.new_ids[number]): decoder}}
    assert small.padding["pad_id"] == kept.new_ids[number]


def test_merges_that_are_strings_stay_strings(tmp_path):
    """Older files spell a merge as one string, and do not state the type of the model."""
    model = json.loads((save_tokenizer("gpt2", tmp_path) / "tokenizer.json").read_text())["model"]
    model |= {"merges": [" ".join(merge) for merge in model["merges"]]}
    del model["type"]
    _, small = cut_latin(read_tokenizer(edit(tmp_path, model=model)), tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert {type(merge) for merge in merges} == {str}
    assert len(merges) < len(model["merges"])
    assert small.decode(small.encode("the dog").ids) == "the dog"


def test_added_tokens_without_a_row_stay_behind_the_rows(tmp_path):
    stored = opened("gemma", tmp_path)
    rows = stored.size - 1
    kept, small = cut_latin(stored, tmp_path, rows=rows)
    assert kept.beyond == (rows,)
    assert kept.new_ids[rows] == len(kept.ids) == small.token_to_id("<image>")


def test_tokens_that_must_be_kept(tmp_path):
    stored = opened("gpt2", tmp_path)
    token = max(stored.model.spellings.keys() - set(latin(stored).ids))
    kept = latin(stored, must_keep=frozenset({token, stored.size + 3}), rows=stored.size + 9)
    assert {token, *stored.model.parts(token)} <= set(kept.ids)
    assert kept.ids[-1] == stored.size + 3  # a row after all tokens


def removable(stored: StoredTokenizer) -> str:
    """Return a token that is removed with all other scripts, and made from others that are."""
    removed = stored.model.spellings.keys() - set(latin(stored).ids)
    return stored.model.spellings[max(removed)]


NAMES: list[dict[str, Any]] = [
    {"bos_token": "{}"},
    {"pad_token": {"content": "{}", "lstrip": False}},
    {"additional_special_tokens": ["{}"]},
    {"extra_special_tokens": {"image_token": "{}"}},
]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("contents", NAMES)
def test_tokens_that_other_files_name_are_kept(name, contents, tmp_path):
    text = removable(opened("gemma", tmp_path))
    (tmp_path / name).write_text(json.dumps(contents).replace("{}", text))
    naming = read_tokenizer(tmp_path)
    assert text in {naming.model.spellings.get(token) for token in latin(naming).ids}


def test_tokens_that_the_post_processor_inserts_are_kept(tmp_path):
    text = removable(opened("gemma", tmp_path))
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    special = [(text, backend.token_to_id(text))]
    backend.post_processor = processors.TemplateProcessing(single=f"{text} $A", special_tokens=special)
    backend.save(str(tmp_path / "tokenizer.json"))
    kept, small = cut_latin(read_tokenizer(tmp_path), tmp_path)
    assert small.encode("the dog").ids == [kept.new_ids[token] for token in backend.encode("the dog").ids]


def test_unigram_keeps_a_token_with_the_smallest_score(tmp_path):
    """The score of unknown characters depends on the smallest score of all tokens."""
    model = json.loads(save_tokenizer("unigram", tmp_path).joinpath("tokenizer.json").read_text())["model"]
    model["vocab"].append(["мммм", -100.0])
    stored = read_tokenizer(edit(tmp_path, model=model))
    assert stored.size - 1 in latin(stored).ids


def test_the_number_of_tokens_is_a_multiple(tmp_path):
    stored = opened("gemma", tmp_path)
    exact = latin(stored)
    # Training at random may leave a multiple of 64 already.
    multiple = 64 if len(exact.ids) % 64 else 65
    rounded = latin(stored, multiple=multiple)
    assert len(rounded.ids) == -(-len(exact.ids) // multiple) * multiple
    assert set(exact.ids) < set(rounded.ids)
    # A token that needs others may not fit into the room that rounding leaves; training orders tokens at random.
    others = sorted(set(range(stored.size)) - set(exact.ids), reverse=True)
    alone = next(token for token in others if not stored.model.parts(token))
    assert alone in latin(stored, multiple=multiple, counts={alone: 5}).ids


def test_tokens_are_made_from_the_parts_that_bpe_joins():
    """The merge that BPE uses for a token is not always the first in the list that leads to it."""
    vocab = {token: number for number, token in enumerate(["a", "b", "c", "bc", "ab", "abc"])}
    merges = [["ab", "c"], ["b", "c"], ["a", "b"], ["a", "bc"]]
    model = Bpe.read({"vocab": vocab, "merges": merges})
    assert model.parts(vocab["abc"]) == (vocab["a"], vocab["bc"])
    assert model.parts(vocab["ab"]) == (vocab["a"], vocab["b"])
    assert model.parts(vocab["a"]) == ()
    assert list(model.parts_first([vocab["abc"]], set())) == [vocab[token] for token in ("c", "b", "bc", "a", "abc")]
    assert Bpe.read({"vocab": vocab, "merges": merges[:3]}).parts(vocab["abc"]) == ()


def test_requests_that_cannot_be_met(tmp_path):
    stored = opened("gpt2", tmp_path)
    said = r"100 tokens are too few: .* alone are 2\d\d"
    assert_error(said, latin, stored, wanted=Wanted(number=100))
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    model["vocab"]["zzz"] = 5000
    stored = read_tokenizer(edit(tmp_path, model=model, added_tokens=[], post_processor=None))
    assert_error("a config names the token id 4000, which is no token", latin, stored, must_keep=frozenset({4000}))
    assert_error("has a token with the id 5,000, but the model has 901 tokens", latin, stored, rows=901)
    (tmp_path / "tokenizer.json").unlink()
    assert_error(r"no tokenizer\.json, .*save_pretrained", read_tokenizer, tmp_path)


def _affixes() -> str:
    tokenizer = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str()


def _padding() -> str:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.enable_padding(pad_id=7, pad_token="a")
    return tokenizer.to_str()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            Tokenizer(models.WordLevel({"a": 0}, "a")).to_str(),
            "the tokenizer is WordLevel; only vocabularies of BPE and",
        ),
        (_affixes(), "end_of_word_suffix is '</w>', and merges with affixes cannot be cut"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "not a valid tokenizer"),
        ('{"model": {"type": "BPE", "vocab": {}, "merges": ["a b c"]}}', "not a valid tokenizer"),
        ('{"model": {"type": "Unigram", "vocab": [["a"]]}}', "not a valid tokenizer"),
        ('{"model": {"type": "Unigram", "vocab": [["a", "1"]]}}', "not a valid tokenizer"),
        ('{"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}}', "not a valid tokenizer"),
        ('{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "its vocabulary is empty"),
        (
            '{"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": [{"id": 4, "content": "<s>"}]}',
            "the added token '<s>' has the id 4, but is loaded with the id 1",
        ),
        (_padding(), "the post-processor or the padding inserts the id 7, which no token has"),
    ],
)
def test_tokenizers_that_cannot_be_cut(contents, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(contents)
    assert_error(f"tokenizer.json: .*{message}", read_tokenizer, tmp_path)


KEPT = KeptTokens((1, 2, 3, 5, 8, 13, 21, 34), beyond=(40,))
CONFIG: dict[str, Any] = {
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": [5, 8],
    "pad_token_id": None,
    "image_token_index": 40,
    "image_start_id": 13,
    "moe_layer_start_index": 1,
    "ignore_token_id": -1,
    "tie_word_embeddings": True,
    "num_hidden_layers": 13,
    "text_config": {"vocab_size": 40, "vocab_size_per_layer_input": 10, "boi_token_index": 13, "hidden_size": 8},
    "vision_config": {"vocab_size": 7, "bos_token_id": 3},
    "audio_config": {"audio_token_id": 21, "depth": 3},
    "suppress_tokens": [2, 3],
    "begin_suppress_tokens": [34],
    "bad_words_ids": [[1, 2], [3]],
}
RENUMBERED: dict[str, Any] = {
    **CONFIG,
    "bos_token_id": 0,
    "eos_token_id": [3, 4],
    "image_token_index": 8,
    "image_start_id": 5,
    "text_config": CONFIG["text_config"] | {"boi_token_index": 5},
    "audio_config": {"audio_token_id": 6, "depth": 3},
    "suppress_tokens": [1, 2],
    "begin_suppress_tokens": [7],
    "bad_words_ids": [[0, 1], [2]],
}


def test_ids_in_configs_are_renumbered():
    assert ids_in(CONFIG, 40) == {-1, 1, 2, 3, 5, 8, 13, 21, 34, 40}
    assert change_ids(CONFIG, 40, lambda token: KEPT.new_ids.get(token, token)) == RENUMBERED


def test_tokens_whose_ids_code_computes_are_found():
    assert fixed_ids({"vision_config": {"vocab_offset": 20}}) == "vision_config.vocab_offset"
    assert fixed_ids({"sequence_bias": [[[5, 8], 2]]}) == "sequence_bias"
    assert fixed_ids({"lang_to_id": None, "forced_decoder_ids": None, **CONFIG}) is None


def test_numbers_of_tokens_in_configs():
    resized = resize_vocabulary(CONFIG, 40, KEPT)
    text = CONFIG["text_config"] | {"vocab_size": 8, "vocab_size_per_layer_input": 5}
    assert resized == {**CONFIG, "vocab_size": 8, "text_config": text}
