"""Structure is read off a class as people wrote it down; every decoder of transformers is read or refused."""

import os
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS

from models import MIXTURES, ROWS, SIMILAR, config_of, make_tokenizer
from secateur import Options, SecateurError, prune
from secateur.base.quiet import quiet
from secateur.families.registry import FAMILIES, UNKNOWN, family_of, known_family
from secateur.layout import derive
from secateur.layout.twin import tiny_twin

DESCRIPTIONS = Path(__file__).with_name("descriptions.yaml")
"""What was found when people still wrote it down, and compared: by row, without the fields that have their defaults."""


def plain(value: Any) -> Any:
    """Return a description, or a part of one, as YAML has it."""
    if not is_dataclass(value):
        return [plain(one) for one in value] if isinstance(value, tuple) else value
    found = {one: getattr(value, one.name) for one in fields(value) if one.name != "entry"}
    return {one.name: plain(own) for one, own in found.items() if own != one.default and not callable(own)}


@pytest.mark.parametrize(("name", "wanted"), yaml.safe_load(DESCRIPTIONS.read_text()).items())
def test_is_what_people_wrote_down(name, wanted):
    assert plain(family_of(config_of(name))) == wanted


def test_every_row_was_written_down():
    assert [*yaml.safe_load(DESCRIPTIONS.read_text())] == [*ROWS, *SIMILAR, *MIXTURES]


ALONE = [kind for kind in DECODERS if kind not in FAMILIES and kind in CONFIG_MAPPING]
SOME = ("exaone", "falcon_h1", "nemotron_h", "jamba", "deepseek_v32", "olmo_hybrid", "minimax", "afmoe", "gpt_bigcode")
EVERY = bool(os.environ.get("EVERY_DECODER"))
"""Whether all decoders are pruned, as `make test-decoders` does; it takes five minutes."""
AT_LEAST = 120
"""Number of decoders, with and without an entry, that can be pruned."""


def test_a_description_is_derived_once(tmp_path, monkeypatch, calls_of):
    """Another process reads it from the cache, unless the file is damaged or the entry says something else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reads = calls_of(derive, "_read")

    def read(name: str, **stated: Any) -> Any:
        monkeypatch.setattr(derive, "_FOUND", {})
        entry = FAMILIES.get(name, UNKNOWN)
        entry = replace(entry, stated=entry.stated | stated) if stated else entry
        try:
            return derive.derive(CONFIG_MAPPING[name](), entry)
        except SecateurError as error:
            return str(error)

    # Its numbers of heads are a function of the config.
    assert callable(read("falcon").key_value_heads)
    assert read("falcon_mamba").startswith("model type 'falcon_mamba' cannot be pruned: ")
    for name in ("falcon", "qwen2_moe"):
        assert read(name) == read(name)
    assert len(reads) == 3
    # A refusal is found anew, because its reason may have been that memory ran out.
    assert read("falcon_mamba") == read("falcon_mamba")
    assert len(reads) == 5
    for file in (tmp_path / "secateur" / "classes").iterdir():
        file.write_text(file.read_text()[:-9])
    assert read("falcon") == read("falcon")
    assert read("falcon", heads_locked="no").heads_locked == "no"
    assert len(reads) == 7


def default_config(kind: str) -> Any:
    """Return the config of a class's decoder with its default values; None if the class refuses its own."""
    with quiet():
        try:
            config = CONFIG_MAPPING[kind]()
        except Exception:
            return None
    return config if getattr(config, "text_config", None) is None else None


def test_every_decoder_is_read_or_refused():
    derived, refused = list[str](), dict[str, str]()
    for kind in ALONE:
        if (config := default_config(kind)) is None:
            continue
        try:
            derived.append((kind, family_of(config).blocks)[0])
        except SecateurError as error:
            refused[kind] = str(error)
    assert all(text.startswith(f"model type '{kind}' cannot be pruned: ") for kind, text in refused.items())
    assert set(SOME) <= set(derived)
    assert len(derived) + len(set(FAMILIES) & set(DECODERS)) >= AT_LEAST, refused


@pytest.mark.parametrize("kind", ALONE if EVERY else SOME)
def test_is_pruned_and_opens(tmp_path, kind):
    config = default_config(kind)
    if config is None or known_family(config) is None:
        pytest.skip("its default config is refused")
    model = tiny_twin(config).model.float()
    model.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    ids = torch.randint(4, 70, (2, 16), generator=torch.Generator().manual_seed(0))
    options = Options(sparsity=0.1, effort="quick", samples=8, length=16, calibration="random", round=1)
    prune(str(tmp_path / "dense"), tmp_path / "out", options)
    with torch.no_grad():
        small = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
        logits = small.eval()(ids, use_cache=False).logits
        cached = small(ids, use_cache=True).logits
    assert logits.isfinite().all()
    assert torch.allclose(logits, cached, atol=1e-4)
    size = [sum(p.numel() for p in one.parameters()) for one in (small, model)]
    assert size[0] < size[1]
