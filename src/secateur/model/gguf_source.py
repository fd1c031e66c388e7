"""A GGUF file to a folder: dequantised once, by transformers where that reads it, and kept in the user's cache."""

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import gguf
import torch
from gguf import GGUFReader
from tokenizers import decoders, normalizers
from tokenizers.normalizers import Prepend, Replace
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from secateur.base.errors import SecateurError
from secateur.base.files import cache_folder, replace_atomically
from secateur.base.quiet import first_line, quiet
from secateur.model.gguf_config import check_read, complete
from secateur.model.gguf_file import is_read_here
from secateur.model.gguf_weights import planned

ADVICE = "make room, or set XDG_CACHE_HOME to another folder"
_LAYOUT = "5"
"""Part of the cache key; to be raised when the conversion changes."""

_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r"})
"""Values of tokenizer.ggml.pre whose split into single digits transformers does not rebuild from a GGUF file."""
_ALIKE = {
    **dict.fromkeys(("hunyuan", "solar-open"), "qwen2"),
    **dict.fromkeys(("chatglm-bpe", "glm4", "glm5"), "llama-bpe"),
}
"""Others that it does not know, and what they split like."""
_WORDS = frozenset({"gpt-2", "jais", "mpt", "olmo", "phi-2"})
"""Those that split as GPT-2, which is what it takes where it does not know."""

_WHOLE = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "glm4", "glm5", "lfm2", "midm-2.0", "pixtral", "tekken"}
)
"""Those under which llama.cpp merges nothing inside a word that is a token itself; transformers does."""


def gguf_folder(file: Path, dtype: torch.dtype) -> Path:
    """The folder with a GGUF file's model as safetensors.

    The first call for a file takes as long as dequantising takes. It needs memory for the whole model, or, where that
    is read here, as mixtures of experts are, for one block of it.

    Args:
        dtype: of the weights to write.

    Raises:
        SecateurError: the file is broken, one of several parts, or of an architecture that is not read from
            GGUF; or the cache cannot be written.
    """
    with file.open("rb") as stream:
        start = stream.read(2**20)
    if start[:4] != b"GGUF":
        raise SecateurError(f"{file}: not a GGUF file (it starts with {start[:4]!r}); download it again")
    folder = cache_folder() / f"{file.stem}-{_key(file, start, dtype)}"
    if folder.is_dir():
        return folder
    reader = _opened(file)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Another process may finish first; its folder is as good as this one.
        with replace_atomically(folder, keep=True, advice=ADVICE) as partial:
            partial.mkdir()
            _convert(file, reader, partial, dtype)
    except OSError as error:
        raise SecateurError(
            f"{folder.parent}: the dequantised model cannot be written ({first_line(error)}); {ADVICE}"
        ) from error
    return folder


def _key(file: Path, start: bytes, dtype: torch.dtype) -> str:
    """A hash of what tells one file from another without reading it all."""
    stat = file.stat()
    facts = f"{_LAYOUT}|{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{dtype}"
    return hashlib.sha256(facts.encode() + start).hexdigest()[:16]


def _opened(file: Path) -> GGUFReader:
    """The file's metadata; refuses what transformers would fail on after a long time, or with a long traceback."""
    try:
        reader = GGUFReader(file)
        architecture = str(reader.fields["general.architecture"].contents())
        parts = reader.fields.get("split.count")
        count = int(parts.contents()) if parts is not None else 1
    except Exception as error:
        # The reader maps the file and trips over whatever is missing, in many ways.
        raise SecateurError(f"{file}: truncated or broken GGUF; download it again") from error
    if count > 1:
        raise SecateurError(f"{file}: one of {count} parts; merge them with llama-gguf-split --merge first")
    # The list spells some names with an underscore that files spell with a hyphen.
    known = {name.replace("-", "_") for name in GGUF_SUPPORTED_ARCHITECTURES}
    if not is_read_here(reader) and architecture.replace("-", "_") not in known:
        raise SecateurError(
            f"{file}: transformers cannot read the architecture {architecture!r} from GGUF; "
            "use the checkpoint that it was made from"
        )
    return reader


def _convert(file: Path, reader: GGUFReader, folder: Path, dtype: torch.dtype) -> None:
    """Dequantise into a folder, tokenizer included."""
    try:
        # The progress bar of the dequantisation cannot be switched off otherwise.
        with quiet(), contextlib.redirect_stderr(io.StringIO()), _read_once(reader):
            if is_read_here(reader):
                write = planned(reader, dtype)
                tokenizer = _tokenizer(PreTrainedTokenizerFast, file, reader)
            else:
                write = _loaded(file, reader, dtype)
                tokenizer = _tokenizer(AutoTokenizer, file, reader)
    except SecateurError as error:
        raise SecateurError(f"{file}: {error}; use the checkpoint that it was made from") from error
    except Exception as error:
        reason = first_line(error)
        raise SecateurError(
            f"{file}: transformers cannot load it ({reason}); use the checkpoint that it was made from"
        ) from error
    with quiet():
        write(folder)
        tokenizer.save_pretrained(folder)


def _loaded(file: Path, reader: GGUFReader, dtype: torch.dtype) -> Callable[[Path], None]:
    """Let transformers read a file, whole; gives what writes it into a folder."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    complete(config, reader)
    model, found = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=config, dtype=dtype, output_loading_info=True
    )
    check_read(model, reader, found["missing_keys"])
    # The weights are quantised no longer; a model that still says so refuses to be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    return cast(Callable[[Path], None], model.save_pretrained)


@contextlib.contextmanager
def _read_once(reader: GGUFReader) -> Iterator[None]:
    """Spare transformers most of its time: it parses the file three times, and lists gguf's names for each tensor."""
    names = cache(gguf.get_tensor_name_map)
    with patch.object(gguf, "GGUFReader", lambda _: reader), patch.object(gguf, "get_tensor_name_map", names):
        yield


def _tokenizer(kind: Any, file: Path, reader: GGUFReader) -> Any:
    """A file's tokenizer, which cuts text as llama.cpp does: cut otherwise, it becomes ids unseen in training.

    Raises:
        SecateurError: its split is not known here.
    """
    said = {key.removeprefix("tokenizer.ggml."): field for key, field in reader.fields.items()}
    name = str(said["pre"].contents()) if "pre" in said else ""
    model = said["model"].contents()
    alike = {other: GGUF_PRE_TOKENIZER_SPLITS[known] for other, known in _ALIKE.items()}
    with patch.dict(GGUF_PRE_TOKENIZER_SPLITS, alike):
        known = name in GGUF_PRE_TOKENIZER_SPLITS or name in _SINGLE_DIGITS | _WORDS
        if model == "gpt2" and not known:
            raise SecateurError(f"its text is split in a way that is not known here ({name or 'it does not say how'})")
        tokenizer = kind.from_pretrained(file.parent, gguf_file=file.name)
    backend = tokenizer.backend_tokenizer
    if name in _SINGLE_DIGITS:
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if name in _WHOLE:
        backend.model.ignore_merges = True
    if model == "llama":
        # transformers puts a blank before the first word alone, and where the file wants none, too.
        blank = "add_space_prefix" not in said or said["add_space_prefix"].contents()
        into = [Prepend("▁")] if blank else []
        back = [decoders.Strip(" ", 1, 0)] if blank else []
        backend.normalizer, backend.pre_tokenizer = normalizers.Sequence([*into, Replace(" ", "▁")]), None
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *back]
        )
    return tokenizer
