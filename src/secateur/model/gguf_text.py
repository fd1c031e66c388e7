"""The tokenizer of a GGUF file, which must split text as llama.cpp does: other tokens were never seen in training.

A file names its pre-tokenizer, the rule by which text is split before merging; transformers knows some of these names.
"""

from pathlib import Path
from typing import Any
from unittest.mock import patch

from gguf import GGUFReader
from tokenizers import decoders, normalizers
from tokenizers.normalizers import Prepend, Replace
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from secateur.base.errors import SecateurError

_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r"})
"""Pre-tokenizers that also split numbers into digits; transformers leaves this split out."""
_SAME_SPLIT = {
    **dict.fromkeys(("hunyuan", "solar-open"), "qwen2"),
    **dict.fromkeys(("chatglm-bpe", "glm4", "glm5"), "llama-bpe"),
}
"""Pre-tokenizers that transformers does not know, each with a known one that splits text in the same way."""
_GPT2_SPLIT = frozenset({"gpt-2", "jais", "mpt", "olmo", "phi-2"})
"""Pre-tokenizers that split as GPT-2 does, which is what transformers assumes for an unknown name."""
_WHOLE_WORDS = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "glm4", "glm5", "lfm2", "midm-2.0", "pixtral", "tekken"}
)
"""Pre-tokenizers with which llama.cpp turns a word that is in the vocabulary into one token, without merging its
characters."""


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

    name, model = stated("pre", ""), stated("model")
    with patch.dict(
        GGUF_PRE_TOKENIZER_SPLITS, {ours: GGUF_PRE_TOKENIZER_SPLITS[same] for ours, same in _SAME_SPLIT.items()}
    ):
        known = name in _SINGLE_DIGITS | _GPT2_SPLIT | GGUF_PRE_TOKENIZER_SPLITS.keys()
        if model == "gpt2" and not known:
            raise SecateurError(
                f"its pre-tokenizer (tokenizer.ggml.pre) is not known to secateur: {name or 'none is named'}"
            )
        kind: Any = PreTrainedTokenizerFast if read_here else AutoTokenizer
        tokenizer = kind.from_pretrained(file.parent, gguf_file=file.name)
    backend = tokenizer.backend_tokenizer
    if name in _SINGLE_DIGITS:
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if name in _WHOLE_WORDS:
        backend.model.ignore_merges = True
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
