"""Folder of a hub id: from the local cache if it is complete there, else downloaded; safetensors only."""

import re
import threading
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from huggingface_hub import (
    constants,
    get_session,
    hf_hub_download,
    is_offline_mode,
    list_repo_files,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from secateur.base.errors import SecateurError
from secateur.base.model_files import SIDE_FILES
from secateur.base.quiet import first_line
from secateur.checkpoints.weights import INDEX, SINGLE, has_weights, index_shards

_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_PATIENCE = 3.0
"""Timeout in seconds for the hub's first answer."""

TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
"""Files of which one is enough for a tokenizer."""

_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")


def looks_like_id(name: str) -> bool:
    """Return whether a name has the form of a hub id: `name` or `owner/name`."""
    return _ID.fullmatch(name) is not None and not name.endswith(".gguf") and ".." not in name


def hub_folder(repo: str, revision: str | None) -> Path:
    """Return the folder with the files of a hub model.

    Args:
        repo: `owner/name`.
        revision: A branch, tag or commit; None for the main branch.

    Returns:
        The snapshot in the local cache. If the cache has a complete one, the hub is not asked.

    Raises:
        SecateurError: The model is not in the cache, and the hub cannot be reached, does not have the model, refuses
            access, or has no safetensors weights for it.
    """
    cached = _cached(repo, revision)
    if cached is not None and any((cached / name).is_file() for name in TOKENIZER):
        return cached
    reason = out_of_reach()
    if reason is not None:
        if cached is not None:
            return cached
        raise SecateurError(f"{repo}: no such folder, not in the cache, and {reason}; name a local folder")
    try:
        names = list_repo_files(repo, revision=revision)
        wanted = choose_files(repo, names, lambda: Path(hf_hub_download(repo, INDEX, revision=revision)))
        # The download takes long, so the hub's own progress bars are shown.
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except GatedRepoError as error:
        raise SecateurError(f"{repo}: gated; accept its terms on the hub and log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise SecateurError(
            f"{repo}: no such folder and no such model on the hub; check the name, or log in if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise SecateurError(f"{repo}: the hub has no revision {revision!r} of it; check the name") from error
    except SecateurError:
        raise
    except Exception as error:
        # Downloads go through several libraries, each with errors of its own.
        raise SecateurError(f"{repo}: download failed ({first_line(error)}); try again") from error


def choose_files(repo: str, names: list[str], read_index: Callable[[], Path]) -> list[str]:
    """Return the files of a repository to download: one set of weights, and all files that a pruned model needs.

    Args:
        repo: `owner/name`, for error messages.
        names: All files of the repository.
        read_index: Function that downloads the index of the shards and returns its path.

    Raises:
        SecateurError: There are no safetensors weights.
    """
    top = [name for name in names if len(PurePosixPath(name).parts) == 1]
    beside = [name for name in names if any(fnmatch(PurePosixPath(name).parts[0], kind) for kind in SIDE_FILES)]
    chosen = [*dict.fromkeys([*beside, *(name for name in top if name.endswith(_SUFFIXES))])]
    if SINGLE in top:
        return [*(name for name in chosen if name != INDEX), SINGLE]
    if INDEX in top:
        return [*chosen, *index_shards(read_index())]
    ggufs = [name for name in top if name.endswith(".gguf")]
    if ggufs:
        raise SecateurError(f"{repo}: only GGUF files, such as {ggufs[0]}; download one and name that file")
    if any(name.endswith((".bin", ".pt", ".pth")) for name in top):
        raise SecateurError(
            f"{repo}: only pickled weights (.bin), which are not opened because they can run code; "
            "use a revision with safetensors (often refs/pr/...), or convert them with save_pretrained"
        )
    raise SecateurError(f"{repo}: no safetensors weights on the hub; use another model or revision")


def _cached(repo: str, revision: str | None) -> Path | None:
    """Return the snapshot in the local cache; None if its config or weights are incomplete."""
    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=["config.json"]))
    except (HfHubHTTPError, OSError, ValueError):
        return None
    return folder if (folder / "config.json").is_file() and has_weights(folder) else None


def out_of_reach() -> str | None:
    """Return why the hub cannot be reached; None if it can. This function asks once with a short timeout, because the
    hub's client would retry for a long time."""
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    answered = threading.Event()

    def ask() -> None:
        # The names of the client's exceptions differ between releases; each of them means that there is no answer.
        with suppress(Exception):
            get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
            answered.set()

    # In a thread, since looking up a name has no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * _PATIENCE)
    return None if answered.is_set() else f"{constants.ENDPOINT} does not answer"
