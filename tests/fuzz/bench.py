"""Intact inputs of fuzz cases, each made once."""

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import secateur.model.pass_checkpoint
from models import ROWS, SIZES, make_letters, save
from secateur import draw_rows, open_model, prune, survey_model
from secateur.base.progress import Silent
from secateur.base.quiet import quiet
from secateur.families.registry import FAMILIES
from secateur.steps import family_file
from tiny_tokenizers import KINDS, save_tokenizer

NEVER = 99
"""Number of an item that no run reaches."""
SMALL: dict[str, Any] = {"calibration": "random", "samples": 4, "length": 8, "device": "cpu", "effort": "quick"}
TEXT = " ".join(f"w{i * 37 % 116}" for i in range(600))

NARROW = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY = AutoConfig.for_model("llama", **SIZES | NARROW | {"intermediate_size": 24})
"""Config of the smallest model, which most inputs are made from."""
EXTEND = Path(__file__).parents[2] / "docs" / "extend.md"
BIOGPT = yaml.safe_load(EXTEND.read_text().partition('title="biogpt.yaml"\n')[2].partition("```")[0])
"""Contents of the family file in docs/extend.md."""


class Stopping(Silent):
    """Watcher that stops a run before its n-th item, as Ctrl-C would."""

    def __init__(self, left: int):
        self.left = left

    def track(self, items: Iterable[Any], what: str, done: int = 0) -> Iterator[Any]:
        for item in items:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            yield item


class Bench:
    """Intact inputs of fuzz cases, each made once."""

    def __init__(self, place: Path):
        self.place = place

    @cache  # noqa: B019
    def dense(self, name: str) -> Path:
        """Return the folder of a row of tests/models.py."""
        return save(name, self.place / name)

    @cached_property
    def tiny(self) -> Path:
        """Folder of the smallest model, with a tokenizer of words."""
        return self.saved("llama tiny", TINY)

    @cached_property
    def letters(self) -> Path:
        """Folder of the smallest model, with a tokenizer that a GGUF file can hold."""
        folder = shutil.copytree(self.tiny, self.place / "letters")
        make_letters().save_pretrained(folder)
        return folder

    @cache  # noqa: B019
    def scripts(self, kind: str) -> Path:
        """Return the folder of the smallest model whose tokenizer has eight scripts, some of which can be cut."""
        size = max(KINDS[kind]().get_vocab().values()) + 1
        config = AutoConfig.for_model("llama", **SIZES | NARROW | {"intermediate_size": 24, "vocab_size": size})
        folder = self.saved(f"llama {kind}", config)
        file = save_tokenizer(kind, folder) / "tokenizer.json"
        PreTrainedTokenizerFast(tokenizer_file=str(file)).save_pretrained(folder)
        return folder

    @cached_property
    def gguf(self) -> Path:
        """GGUF file of the smallest model, pruned."""
        prune(self.letters, self.place / "tiny.gguf", **SMALL, widths="uniform", format="gguf", type="f32")
        return self.place / "tiny.gguf"

    @cached_property
    def shards(self) -> Path:
        """Folder of the smallest model in several shards."""
        folder = shutil.copytree(self.tiny, self.place / "shards")
        (folder / "model.safetensors").unlink()
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(self.tiny, dtype=torch.float32)
            model.save_pretrained(folder, max_shard_size="12kB")
        return folder

    @cached_property
    def text(self) -> Path:
        file = self.place / "text.txt"
        file.write_text(TEXT)
        return file

    @cached_property
    def survey(self) -> Path:
        """Survey file of the smallest model."""
        run = open_model(self.tiny, **SMALL, survey=self.place / "survey.json")
        survey_model(run, draw_rows(run))
        return self.place / "survey.json"

    @cache  # noqa: B019
    def pruned(self, widths: str) -> Path:
        """Return the folder of the smallest model, pruned."""
        out = self.place / f"pruned-{widths}"
        prune(self.letters, out, **SMALL, widths=widths)
        return out

    @cache  # noqa: B019
    def stopped(self, item: int) -> Path:
        """Return the run folder of a run that was stopped before its n-th item."""
        out = self.place / f"stopped-{item}"
        with (
            patch.object(secateur.model.pass_checkpoint, "SPENT", float("inf")),
            contextlib.suppress(KeyboardInterrupt),
        ):
            prune(self.tiny, out, **SMALL, watcher=Stopping(item))
        return out.with_name(f".{out.name}.run")

    @cached_property
    def biogpt(self) -> Path:
        """Folder of a model whose family only a YAML file describes."""
        family_file._READ.add("biogpt")
        with patch.dict(FAMILIES):
            family_file.read_family(self.described)
            return self.saved("biogpt", AutoConfig.for_model("biogpt", **SIZES))

    @cached_property
    def described(self) -> Path:
        file = self.place / "biogpt.yaml"
        file.write_text(yaml.safe_dump(BIOGPT))
        return file

    def saved(self, name: str, config: Any) -> Path:
        """Save a random model of a config."""
        with patch.dict(ROWS, {name: lambda: config}):
            return save(name, self.place / name)
