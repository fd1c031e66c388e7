"""Checkpoint of a model: a folder, a hub id or a GGUF file. It is checked before long work, and tensors are read one at
a time."""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.hashes import hash_json
from secateur.base.model_files import SIDE_FILES
from secateur.base.quiet import first_line, quiet
from secateur.base.words import first_few
from secateur.checkpoints.config_file import (
    TEXT,
    TOWER_CONFIGS,
    check_generation,
    decoder_config,
    empty_model,
    has_own_code,
    load_config,
    made_by,
    read_config,
)
from secateur.checkpoints.conversions import converted
from secateur.checkpoints.facts import positions_of
from secateur.checkpoints.hub_source import TOKENIZER, hub_folder, looks_like_id
from secateur.checkpoints.quantised import dequantised, quantisation, without_quantisation
from secateur.checkpoints.stored import Stored
from secateur.checkpoints.tokens import is_fault
from secateur.checkpoints.weights import TensorInfo, Transposed, list_tensors
from secateur.families.registry import experts_of, known_family, twin_of

_BUFFERS = re.compile(r"(^|\.)((attn|attention)\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
"""Names of buffers that old checkpoints store and every model computes itself: causal masks and rotary tables."""

_PREDICTION_HEADS = re.compile(r"(^|\.)mtp[._]")
"""Names of multi-token prediction heads, unless they are stored as blocks after the last block."""

PREDICTION_HEAD_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")
"""Config keys of the number of multi-token prediction heads."""

_SAMPLE = 4096
"""Number of bytes that the fingerprint reads at each of three places of a tensor."""
_FILES = {".gguf": "secateur.gguf.source"}
"""Modules that turn a file into a folder, by the ending of the file's name. They are above this folder."""
_NOT_DECISIVE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
"""Keys of config.json that do not change what the model computes here."""


@dataclass(kw_only=True)
class Checkpoint(Stored):
    """Decoder language model on disk.

    Attributes:
        path: Folder with the weights.
        side_folder: Folder with config.json, the tokenizer and all other files: `path`, or a folder of edited copies.
        uncut: The checkpoint with its whole vocabulary, if this one has fewer tokens.
        kept_tokens: Ids in `uncut` of the tokens, in the order of their ids here; empty if there is no `uncut`.
        raw_config: Contents of config.json, or its part for the language model.
        dtype: The most common floating dtype of the stored weights, by bytes.
        trust_remote_code: Whether the checkpoint's own code is needed and may run.
        quantised: Whether weights are stored quantised; `read` returns them dequantised.
        left_out: Stored tensors that the model has no place for; prediction heads, and see `check_shapes`.
    """

    path: Path
    side_folder: Path
    raw_config: dict[str, Any]
    dtype: torch.dtype
    uncut: "Checkpoint | None" = None
    kept_tokens: tuple[int, ...] = ()
    trust_remote_code: bool = False
    quantised: bool = False
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Leave out multi-token prediction heads, because they were trained on the dense model's output.

        They are stored under names with `mtp`, or as blocks after the last block.
        """
        family = known_family(self.config)
        places = self.candidate_names(f"{family.blocks}.") if family else []
        count = self.config.num_hidden_layers

        def further(name: str) -> bool:
            indices = (name.removeprefix(place).partition(".")[0] for place in places if name.startswith(place))
            return bool(_PREDICTION_HEADS.search(name)) or any(
                index.isdecimal() and int(index) >= count for index in indices
            )

        self._leave(list(filter(further, self.tensors)))
        if self.left_out:
            absent = {key: 0 for key in PREDICTION_HEAD_KEYS if self.raw_config.get(key)}
            self.raw_config = self.raw_config | absent

    def _leave(self, names: Collection[str]) -> None:
        """Leave out some tensors, which are then neither counted nor written."""
        self.tensors = {name: info for name, info in self.tensors.items() if name not in names}
        self.left_out += tuple(names)

    @property
    def weights(self) -> dict[str, TensorInfo]:
        """Stored tensors without the buffers that every model computes itself; these are not written."""
        return {name: info for name, info in self.tensors.items() if not _BUFFERS.search(name)}

    @property
    def original(self) -> "Checkpoint":
        """The checkpoint with its whole vocabulary."""
        return self if self.uncut is None else self.uncut

    @property
    def cut_entries(self) -> int:
        """Number of parameters of the tokens that were cut from the vocabulary."""
        stored = self.original.tensors
        return sum(stored[name].entries - info.entries for name, info in self.weights.items())

    @cached_property
    def fingerprint(self) -> str:
        """Hash that identifies the weights, whatever the name of the folder and the tokens that are kept.

        The hash covers the name, shape and dtype of every tensor, and some bytes at its start, middle and end.
        Fine-tuning changes all tensors, new tokens change the end of two tensors, and hashing a whole model would take
        long.
        """
        digest = hashlib.sha256()
        for name, info in sorted(self.original.tensors.items()):
            digest.update(f"{name}|{info.shape}|{info.dtype}|".encode())
            for sample in info.samples(_SAMPLE):
                digest.update(sample)
        return digest.hexdigest()[:32]

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of the weights and of config.json, by which a changed model is noticed."""
        config = self.original.raw_config
        decisive = {key: value for key, value in config.items() if key not in _NOT_DECISIVE}
        return {"fingerprint": self.fingerprint, "config": hash_json(decisive)}

    def buffers_of(self, network: nn.Module) -> frozenset[str]:
        """Return the stored names of a model's buffers, such as the biases of a router. They are no parameters."""
        return frozenset(filter(None, (self.resolve(name) for name, _ in network.named_buffers())))

    @property
    def whole_config(self) -> dict[str, Any]:
        """Contents of config.json, with corrections where the weights contradict the stored file."""
        whole = self.multimodal_config
        return self.raw_config if whole is None else whole | {TEXT: self.raw_config}

    @property
    def auto_class(self) -> Any:
        """Auto class of transformers that opens the whole model."""
        return AutoModelForCausalLM if self.multimodal_config is None else AutoModelForImageTextToText

    def load(self, auto: Any, dtype: torch.dtype, **options: Any) -> Any:
        """Load the checkpoint with an auto class or a class of transformers; quantised weights are dequantised here.

        Raises:
            SecateurError: transformers cannot load the checkpoint.
        """
        folder = self.side_folder
        config = load_config(folder, read_config(folder), trust_remote_code=self.trust_remote_code)
        options |= {"config": config, "dtype": dtype}
        with self.model_errors():
            if not self.quantised and self.uncut is None:
                return auto.from_pretrained(self.path, trust_remote_code=self.trust_remote_code, **options)
            if self.quantised:
                del config.quantization_config
            values = {name: self.read(name).to(dtype) for name in self.weights}
            return made_by(auto, config).from_pretrained(None, state_dict=values, **options)

    @contextmanager
    def model_errors(self) -> Iterator[None]:
        """Raise errors of transformers' classes about an impossible config.json as `SecateurError`."""
        try:
            yield
        except (SecateurError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise SecateurError(f"{self.source}: transformers cannot make a model of config.json ({reason})") from error

    @property
    def max_positions(self) -> int | None:
        """Largest number of positions, if the model has a limit."""
        return positions_of(self.config)

    @property
    def bytes(self) -> int:
        """Number of bytes of all stored weights."""
        return sum(info.bytes for info in self.weights.values())

    @property
    def entries(self) -> int:
        """Number of entries of all stored weights."""
        return sum(info.entries for info in self.weights.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """Files besides config and weights that are copied to the output: tokenizer, chat templates, generation
        settings."""
        wanted = (*SIDE_FILES, "*.py") if self.trust_remote_code else SIDE_FILES
        entries = sorted(self.side_folder.iterdir())
        return tuple(entry for entry in entries if any(fnmatch(entry.name, glob) for glob in wanted))

    def check_range(self, dtype: torch.dtype) -> None:
        """Check that a dtype can represent every weight; all weights are read.

        Raises:
            SecateurError: A weight would become infinite in that dtype; the message names the tensor.
        """
        most = torch.finfo(dtype).max
        for name, info in self.weights.items():
            if info.dtype.is_floating_point and torch.finfo(info.dtype).max > most:
                largest = float(self.read(name).abs().max()) if info.entries else 0.0
                if most < largest < float("inf"):
                    raise SecateurError(
                        f"{self.source}: {name} holds {largest:,.0f}, but {str(dtype).removeprefix('torch.')} goes "
                        f"only to {most:,.0f}; use bfloat16 or float32"
                    )

    def empty(self, auto: Any) -> Any:
        """Build the model of the config with a class of transformers, in float32 and without weights.

        Raises:
            SecateurError: The class cannot build the model.
        """
        with self.model_errors():
            return empty_model(auto, self.config)

    def check_shapes(self, model: nn.Module) -> None:
        """Check that the stored tensors are the tensors of the model that the config describes.

        Tensors that the model does not have are left out, as transformers does, except for the towers of a multimodal
        model. If config.json ties the output layer to the embedding, and the stored tensors differ, the model is
        treated as untied.

        Args:
            model: The transformers model, on the meta device or not.

        Raises:
            SecateurError: Tensors other than tied ones are missing, or tensors have another shape.
        """
        tied = tied_weights(model)
        missing, wrong, unused = self._compared(model)
        if missing:
            raise self.missing_weights_error(missing)
        if wrong:
            raise SecateurError(f"{self.source}: {_first_of(wrong)}; find the config.json of these weights")
        self._leave(unused)
        for name, source in tied.items():
            own, other = self.resolve(name), self.resolve(source)
            if own and other and self._differ(own, other):
                # transformers 5 loads both tensors, whatever config.json says; engines follow config.json.
                self.config.tie_word_embeddings = False
                for part in (self.raw_config, self.multimodal_config or {}):
                    part["tie_word_embeddings"] = False

    def _differ(self, one: str, other: str) -> bool:
        """Return whether samples of two stored tensors differ."""
        samples = (list(self.tensors[name].samples(_SAMPLE)) for name in (one, other))
        return next(samples) != next(samples)

    def difference_from(self, model: nn.Module) -> str | None:
        """Return the difference between the stored tensors and the tensors of a model, as a clause; None if they are
        the same."""
        missing, wrong, unused = self._compared(model)
        if missing:
            return f"tensors missing from the weights: {first_few(missing)}"
        if wrong:
            return _first_of(wrong)
        return f"tensors without a place in the model: {first_few(unused)}" if unused else None

    def _compared(self, model: nn.Module) -> tuple[list[str], list[str], list[str]]:
        """Return the model's tensors that are not stored, descriptions of tensors that do not fit, and stored tensors
        that the model does not have.

        For a multimodal model the third list is empty, because the towers are not part of `model`.
        """
        missing, wrong, used = list[str](), list[str](), set[str]()
        tied = tied_weights(model)
        for name, tensor in model.state_dict().items():
            pieces = self.pieces(name)
            if not pieces and name not in tied:
                missing.append(name)
            used.update(pieces)
            shape = tuple(tensor.shape)
            if len(pieces) > 1:
                shape = (shape[1] // self.matrices_per_expert(name), *shape[2:])
            for stored in pieces:
                found = self.tensors[stored]
                if tensor.is_floating_point() and not found.dtype.is_floating_point:
                    raise SecateurError(
                        f"{self.source}: {stored} holds {found.dtype}: integers instead of weights; "
                        "use an unquantised checkpoint"
                    )
                if found.shape != shape:
                    wrong.append(f"{stored} is {list(found.shape)}, but config.json makes it {list(shape)}")
        unused = [name for name in self.weights if name not in used] if self.multimodal_config is None else []
        return missing, wrong, unused

    def missing_weights_error(self, names: list[str]) -> SecateurError:
        """Return the error for missing weights."""
        return SecateurError(
            f"{self.source}: tensors missing from the weights: {first_few(names)}; "
            "download them again, or check that config.json belongs to them"
        )

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder has the files of a tokenizer."""
        return any(file.name in TOKENIZER or file.suffix == ".tiktoken" for file in self.files)

    def tokenizer(self) -> Any:
        """Return the checkpoint's tokenizer.

        Raises:
            SecateurError: The checkpoint has no tokenizer, or transformers cannot load it.
        """
        if not self.has_tokenizer:
            raise SecateurError(f"{self.source}: no tokenizer files; copy the model's into the folder")
        try:
            with quiet():
                return AutoTokenizer.from_pretrained(self.side_folder, trust_remote_code=self.trust_remote_code)
        except BaseException as error:
            if not is_fault(error):
                raise
            raise SecateurError(f"{self.source}: the tokenizer does not load ({first_line(error)})") from error


def open_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Checkpoint:
    """Open a model.

    Args:
        model: Path of a folder or of a .gguf file, or a hub id. An existing path takes precedence over a hub id.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether the checkpoint's own code may run if transformers does not know the model.
        dtype: Dtype to which a GGUF file is dequantised; other checkpoints keep their dtype.

    Raises:
        SecateurError: The model does not exist, is broken or incomplete, is not a decoder language model, or is
            quantised in an unknown way.
    """
    source = str(model)
    folder = _locate(source, revision, dtype)
    raw = read_config(folder)
    if (adapter := folder / "adapter_config.json").is_file():
        raise SecateurError(
            f"{adapter}: transformers would add this adapter to the model; merge it into the weights first"
        )
    config = load_config(folder, raw, trust_remote_code=trust_remote_code)
    check_generation(folder)
    tensors, settings = list_tensors(folder), quantisation(raw)
    if settings is not None:
        tensors = dequantised(tensors, settings, folder)
    fields = described(raw, config)
    own = fields["config"]
    stored_dtype = common_dtype(source, tensors)
    if own.num_hidden_layers > len(tensors):
        raise SecateurError(
            f"{folder / 'config.json'}: num_hidden_layers is {own.num_hidden_layers:,}, but only {len(tensors):,} "
            "tensors are stored; find the config.json of these weights"
        )
    if (twin := twin_of(own)) and twin.inputs_first:
        tensors = {name: _upright(name, info, own.hidden_size) for name, info in tensors.items()}
    aliases: dict[str, str] = {}
    if not has_own_code(config):
        tensors, aliases = converted(tensors, own.model_type, joins_experts=lambda: experts_of(own) is None)
    checkpoint = Checkpoint(
        source=source,
        path=folder,
        side_folder=folder,
        **fields,
        dtype=stored_dtype,
        tensors=tensors,
        aliases=aliases,
        trust_remote_code=trust_remote_code and has_own_code(config),
        quantised=settings is not None,
    )
    _check_links(folder, checkpoint.files)
    return checkpoint


def _check_links(folder: Path, files: Iterable[Path]) -> None:
    """Raise `SecateurError` for a file that would be copied to the output, but is a link out of the model's folder.

    In the hub's cache, the files of a snapshot are links to blobs of the same model.
    """
    own = folder.resolve()
    places = (own, own.parents[1] / "blobs") if own.parent.name == "snapshots" else (own,)
    for entry in (*files, *folder.glob("README*.md")):
        for file in (entry, *entry.rglob("*")):
            if not any(map(file.resolve().is_relative_to, places)):
                raise SecateurError(
                    f"{file}: a link to {file.resolve()}, outside of the model's folder; put a copy of the file there"
                )


def described(raw: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return the fields of a `Checkpoint` that come from config.json.

    Args:
        raw: Contents of the file.
        config: The config object that transformers makes of it.
    """
    raw = without_quantisation(raw)
    if not any(raw.get(key) for key in TOWER_CONFIGS):
        return {"config": config, "raw_config": raw, "multimodal_config": None}
    return {"config": decoder_config(config), "raw_config": raw.get(TEXT) or {}, "multimodal_config": raw}


def _locate(source: str, revision: str | None, dtype: torch.dtype) -> Path:
    """Return the folder of a checkpoint."""
    path = local_path(source)
    if path.exists() and revision is not None:
        raise SecateurError(f"{source}: a local path has no revision {revision!r}; leave it out")
    if path.is_dir():
        return path
    if path.is_file():
        if (module := _FILES.get(path.suffix)) is not None:
            folder: Path = import_module(module).folder_of(path, dtype)
            return folder
        raise SecateurError(f"{source}: this file is not a .gguf file; name the model's folder")
    if not looks_like_id(source):
        raise SecateurError(f"{source}: does not exist; name a folder, a .gguf file or a hub id (owner/name)")
    return hub_folder(source, revision)


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Return the names of tied parameters, each with the name of the parameter whose values it has."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def _first_of(wrong: list[str]) -> str:
    """Return the first difference, and the number of other differences."""
    return wrong[0] + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")


def _upright(name: str, info: TensorInfo, hidden: int) -> TensorInfo:
    """Return a stored tensor in the orientation of transformers 5: 4.57 stores the matrices of some experts
    transposed."""
    place = 2 if name.endswith(".mlp.experts.gate_up_proj") else 1 if name.endswith(".mlp.experts.down_proj") else None
    if place is None or len(info.shape) != 3 or info.shape[place] == hidden:
        return info
    return Transposed.of(info)


def common_dtype(source: str, tensors: dict[str, TensorInfo]) -> torch.dtype:
    """Return the floating-point dtype with the most bytes."""
    sizes: Counter[torch.dtype] = Counter()
    for name, info in tensors.items():
        if info.dtype.is_floating_point and not _BUFFERS.search(name):
            sizes[info.dtype] += info.bytes
    if not sizes:
        raise SecateurError(f"{source}: no floating-point weights; use an unquantised checkpoint")
    common = sizes.most_common(1)[0][0]
    if common.itemsize < 2:
        raise SecateurError(f"{source}: 8-bit weights ({common}); use an unquantised checkpoint")
    return common
