"""GGUF files that transformers cannot read are measured by llama.cpp, as their folders are by transformers."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from command_line import TEXT
from gguf import GGUFReader

from models import relative, token_rows
from outputs import error_of
from secateur import SecateurError, prune
from secateur.gguf.export import export
from secateur.measure import loading, speeds
from secateur.measure.answers import agreement
from secateur.measure.evaluation import evaluate
from secateur.measure.generation import greedy_tokens
from secateur.measure.llama_cpp import LlamaCppFile, LlamaCppModel
from secateur.measure.loading import load, open_to_measure
from secateur.report.tables import eval_table

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]
WIDTHS = {"llama": "adaptive", "gemma4_text small": "adaptive", "olmo2": "uniform"}


class Pair(NamedTuple):
    folder: Path
    file: Path


@pytest.fixture(scope="module", params=WIDTHS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, letters_folder: Any) -> Pair:
    """Return a pruned model, as a folder and as a GGUF file of the same weights."""
    place = tmp_path_factory.mktemp("pair")
    how: dict[str, Any] = {"calibration": "random", "samples": 8, "length": 16, "recovery": "none", "device": "cpu"}
    prune(letters_folder(request.param), place / "out", sparsity=0.4, widths=WIDTHS[request.param], **how)
    return Pair(place / "out", export(place / "out", place / "out.gguf", type="f32").path)


def test_both_have_the_same_figures(pair, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    texts = [str(tmp_path / "text.txt")]
    result = evaluate(str(pair.file), against=str(pair.folder), texts=texts, length=16, tokens=128, speed=True)
    file, folder = result.models
    assert file.texts[texts[0]].nll == pytest.approx(folder.texts[texts[0]].nll, abs=1e-3)
    assert file.texts[texts[0]].bytes == folder.texts[texts[0]].bytes
    if "gemma4" not in str(open_to_measure(str(pair.folder)).config.model_type):
        assert file.parameters == folder.parameters
    assert any("f32 on cpu" in line for line in eval_table(result)[1])
    figures = {figure.label: figure.values for figure in result.figures()}
    written = sum(int(one.n_bytes) for one in GGUFReader(pair.file).tensors)
    # The folder's size in the dtype of the file, float16, is half of what it takes.
    assert figures["bytes as stored"] == pytest.approx([written, 2 * folder.bytes], rel=1e-3)
    assert figures["bits per weight"] == pytest.approx([32, 32], rel=0.01)


def test_logits_are_those_of_transformers(pair):
    ids = token_rows(3, 12)
    dense, network = (load(open_to_measure(str(one)), torch.float32, torch.device("cpu")) for one in pair)
    expected = dense(input_ids=ids).logits.detach()
    assert relative(network(input_ids=ids).logits, expected) < 5e-3
    # After other rows, which stay in the context, the result is the same.
    assert relative(network(input_ids=ids.flip(1)).logits, expected) > 0.1
    assert torch.equal(network(input_ids=ids).logits, network(input_ids=ids).logits)


class Counting:
    """llama.cpp's library, which notes how many tokens run at once."""

    def __init__(self, network: Any):
        self.library, self.counts = network._library, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)

    def llama_decode(self, context: Any, batch: Any) -> Any:
        self.counts.append(batch.n_tokens)
        return self.library.llama_decode(context, batch)


def test_every_run_of_a_speed_measurement_begins_with_the_whole_prompt(pair):
    network = LlamaCppModel(LlamaCppFile(str(pair.file)))
    network._library = counting = Counting(network)
    speeds([network], prompt=12, new=2, repeats=2)
    assert counting.counts == [12, 1, 1] * 3


def test_a_batch_of_texts_equals_the_texts_one_by_one(pair):
    network = LlamaCppModel(LlamaCppFile(str(pair.file)))
    batch = greedy_tokens(network, PROMPTS, ends=[], new_tokens=8)
    alone = [greedy_tokens(network, [prompt], ends=[], new_tokens=8)[0] for prompt in PROMPTS]
    assert batch == alone
    assert agreement(network, PROMPTS, batch) == 1.0
    # A token that ends a text ends it.
    end = batch[0][3]
    cut = greedy_tokens(network, PROMPTS, ends=[end], new_tokens=8)
    assert cut[0] == batch[0][: batch[0].index(end)]


def test_a_broken_file_and_a_missing_library_are_one_line(pair, monkeypatch, tmp_path):
    def missing() -> None:
        raise SecateurError("it is not installed")

    for size, message in ((-8192, r"llama\.cpp does not load|truncated or broken"), (100, "truncated or broken GGUF")):
        (tmp_path / "broken.gguf").write_bytes(pair.file.read_bytes()[:size])
        assert re.search(message, error_of(lambda: LlamaCppModel(open_to_measure(str(tmp_path / "broken.gguf")))))
    monkeypatch.setattr(loading, "library", missing)
    assert "; llama.cpp may be able to run it, but it is not installed" in error_of(open_to_measure, str(pair.file))


def test_other_files_are_run_by_transformers(tmp_path, letters_folder):
    file = export(letters_folder("llama"), tmp_path / "dense.gguf", type="f32").path
    assert not isinstance(open_to_measure(str(file)), LlamaCppFile)
