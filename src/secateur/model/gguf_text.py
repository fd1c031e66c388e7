"""The tokenizer of a GGUF file, which must split text as llama.cpp does: other tokens were never seen in training."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from tokenizers import decoders, normalizers
from tokenizers.normalizers import Prepend, Replace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from secateur.model.gguf_splits import split_rule


@contextmanager
def alone(file: Path) -> Iterator[Path]:
    """Yield a folder that holds a link to a file and nothing else.

    transformers takes a tokenizer or a config that lies beside a GGUF file instead of the one inside.
    """
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder)


def read_tokenizer(file: Path, reader: GGUFReader, read_here: bool) -> Any:
    """Return the tokenizer of a file.

    Args:
        file: The GGUF file.
        reader: The open file.
        read_here: secateur reads the weights, so that transformers has no tokenizer class for the architecture.

    Raises:
        SecateurError: The pre-tokenizer is not known here.
    """

    def stated(key: str, default: Any = None) -> Any:
        field = reader.fields.get(f"tokenizer.ggml.{key}")
        return default if field is None else field.contents()

    model = stated("model")
    rule = split_rule(stated("pre", "")) if model == "gpt2" else None
    kind: Any = PreTrainedTokenizerFast if read_here else AutoTokenizer
    with alone(file) as folder:
        tokenizer = kind.from_pretrained(folder, gguf_file=file.name)
    tokenizer.name_or_path = str(file)
    backend = tokenizer.backend_tokenizer
    if rule is not None:
        # transformers knows fewer names, and would split text as GPT-2 does.
        backend.pre_tokenizer, backend.model.ignore_merges = rule
    if model == "llama":
        _split_as_sentencepiece(backend, prefix=stated("add_space_prefix", True))
    return tokenizer


def _split_as_sentencepiece(backend: Any, prefix: bool) -> None:
    """Let a tokenizer treat spaces as SentencePiece does, with a space before a text where the file requires one.

    transformers adds the space whatever the file says, and only before the first word.
    """
    add, remove = ([Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if prefix else ([], [])
    backend.normalizer, backend.pre_tokenizer = normalizers.Sequence([*add, Replace(" ", "▁")]), None
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *remove])
