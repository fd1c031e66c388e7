"""Names of all criteria, recoveries, output formats, families and kinds of units, each with the place of its code.

No other file lists them. The tables need no torch, so that `--help` lists the names, and a misspelt one is found,
without waiting for it. Another package adds names by entry points, whose values have the same form as these places:
`module:object`, or a module.
"""

import warnings
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from secateur.base.errors import SecateurError
from secateur.base.output import Kind, Output


def find(place: str) -> Any:
    """Return the object or the module that a place names.

    Raises:
        SecateurError: Another package names an object that does not exist, or a module that cannot be imported.
    """
    try:
        return EntryPoint("", place, "").load()
    except (AttributeError, ImportError) as error:
        if place.startswith("secateur."):
            raise
        raise SecateurError(f"{place}, an entry point, cannot be loaded ({error}); correct its package") from error


def _with_others(kind: str, own: dict[str, str]) -> dict[str, str]:
    """Return a table with the names that other packages add; none of them replaces a name of secateur's own."""
    others = {one.name: one.value for one in entry_points(group=f"secateur.{kind}")}
    return own | {name: place for name, place in others.items() if name not in own}


CRITERIA = _with_others(
    "criteria",
    {
        "surgeon": "secateur.criteria.surgeon:ranking",
        "flap-wifv": "secateur.criteria.flap:wifv",
        "flap-ifv": "secateur.criteria.flap:ifv",
        "flap-wifn": "secateur.criteria.flap:wifn",
        "l1": "secateur.criteria.simple:l1",
        "l2": "secateur.criteria.simple:l2",
        "llm-pruner-vector": "secateur.criteria.llm_pruner:vector",
        "llm-pruner-element1": "secateur.criteria.llm_pruner:element1",
        "llm-pruner-element2": "secateur.criteria.llm_pruner:element2",
        "random": "secateur.criteria.simple:random",
        "second-moment": "secateur.criteria.second_moment:scores",
        "second-moment-identity": "secateur.criteria.second_moment:identity",
        "wanda": "secateur.criteria.simple:wanda",
    },
)
"""Criteria of heads and of channels, the default first; each is a `secateur.criteria.registry.Criterion`."""

RECOVERIES = _with_others(
    "recoveries",
    {
        "refit": "secateur.fit.recoveries:Refit",
        "bias": "secateur.fit.recoveries:BiasCompensation",
        "none": "secateur.fit.recoveries:NoRecovery",
        "paper": "secateur.fit.recoveries:PaperRecovery",
    },
)
"""Recoveries, the default first; each is a subclass of `secateur.fit.recovery.Recovery`."""

LINEAGES = _with_others(
    "families",
    {
        name: f"secateur.families.{name}"
        for name in ("llama", "gpt", "qwen", "mistral", "gemma", "deepseek", "glm", "bloom", "hybrid")
    },
)
"""Modules with the entries of related families; see `secateur.families.registry`."""

UNITS = {name: f"secateur.model.units.{name}" for name in ("channels", "experts", "heads")}
"""Modules with kinds of units; see `secateur.model.units`."""


@dataclass(frozen=True)
class Declaration:
    """Properties of an output format that are known before its class is imported."""

    name: str
    help: str
    """Description in `--help`."""
    place: str
    """Place of its class, a subclass of `secateur.formats.format.Format`."""
    suffix: str | None = None
    """Ending of the file's name; None for a folder."""
    magic: str = ""
    """First characters of every file of the format; a file with others is not replaced."""
    uniform: bool = False
    """Whether the format holds only models whose blocks all have one width."""
    types: tuple[str, ...] = ()
    """Values of `--type`, the default first, if the format has types of tensors."""
    tokenizer: bool = False
    """Whether the output cannot be written without a tokenizer."""

    def output(self, out: Path, *, source: Path | None = None, overwrite: bool = False) -> Output:
        """Return the output that is to be written.

        Args:
            out: The file or folder.
            source: Folder or file of the dense model, which the output must not touch.
            overwrite: Replace an output that exists.

        Raises:
            SecateurError: The name has the ending of another format's file.
        """
        if self.suffix is not None:
            # A file may be written into the folder of the model.
            file = source if source is not None and source.is_file() else None
            kind = Kind(f"a {self.name} file", self._is_one)
            return Output(out, suffix=self.suffix, overwrite=overwrite, source=file, kind=kind)
        if other := next((one for one in FORMATS.values() if one.suffix and out.name.endswith(one.suffix)), None):
            raise SecateurError(
                f"{out}: the format {self.name} writes a folder; add --format {other.name}, or leave out {other.suffix}"
            )
        return Output(out, overwrite=overwrite, source=source)

    def _is_one(self, path: Path) -> bool:
        """Return whether a file is of this format."""
        with path.open("rb") as file:
            return file.read(len(self.magic)) == self.magic.encode()


_OWN_FORMATS = (
    Declaration(
        "hf",
        "a folder in which each block has its own widths, loaded by transformers with trust_remote_code=True",
        "secateur.formats.per_layer:HfFolder",
    ),
    Declaration(
        "stock",
        "a folder in which all blocks have the same widths, loaded by the standard transformers class",
        "secateur.formats.stock:StockFolder",
        uniform=True,
    ),
    Declaration(
        "gguf",
        "a file for llama.cpp",
        "secateur.gguf.format:GgufFormat",
        suffix=".gguf",
        magic="GGUF",
        types=("f16", "f32", "bf16", "q8_0", "q4_0", "as-input"),
        tokenizer=True,
    ),
)
FORMATS: dict[str, Declaration] = {one.name: one for one in _OWN_FORMATS}
"""Output formats, the default first. An entry point of another package names a `Declaration`, in a module without
torch."""
for _place in _with_others("formats", {}).values():
    try:
        _declaration: Declaration = find(_place)
        FORMATS.setdefault(_declaration.name, _declaration)
    except (AttributeError, SecateurError) as error:
        # This file is imported before any command can print an error.
        warnings.warn(f"a format is left out: {error}", stacklevel=2)
