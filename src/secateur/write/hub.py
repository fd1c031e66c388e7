"""Upload of a finished model to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from secateur.base.errors import SecateurError
from secateur.base.progress import Watcher
from secateur.base.quiet import first_line
from secateur.checkpoints.hub_source import looks_like_id


def check_upload(repo: str) -> None:
    """Check that a model could be uploaded to a repository, `owner/name`.

    Raises:
        SecateurError: The name is not of this form, nobody is logged in, or the hub does not answer.
    """
    if "/" not in repo or not looks_like_id(repo):
        raise SecateurError(f"push-to-hub is '{repo}'; write owner/name")
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise SecateurError(f"{repo}: nobody is logged in to the hub; run hf auth login first") from error
    except Exception as error:
        # The client passes on errors of several libraries.
        raise SecateurError(f"{repo}: the hub does not accept an upload: {first_line(error)}") from error


def upload(out: Path, repo: str, watcher: Watcher) -> str:
    """Upload a folder or a .gguf file, and return its address. A new repository is private.

    Args:
        out: The complete output.
        repo: Repository on the hub, `owner/name`.
        watcher: Receives progress.

    Raises:
        SecateurError: The upload failed. The output on disk stays complete.
    """
    api, message = HfApi(), "Pruned by secateur"
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        with watcher.busy(f"Uploading {out} to {repo}"):
            if out.is_dir():
                # Without this, shards of an earlier model would stay in the repository.
                stale = ["*.safetensors", "*.safetensors.index.json"]
                api.upload_folder(repo_id=repo, folder_path=out, commit_message=message, delete_patterns=stale)
            else:
                api.upload_file(repo_id=repo, path_or_fileobj=out, path_in_repo=out.name, commit_message=message)
    except Exception as error:
        raise SecateurError(
            f"{out} is complete, but the upload failed: {first_line(error)}; try again with hf upload {repo} {out}"
        ) from error
    return f"{api.endpoint}/{repo}"
