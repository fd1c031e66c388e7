"""Uploads to the Hugging Face Hub, whose client is replaced by one with the same methods that keeps the files here."""

from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from outputs import Notes, assert_error
from secateur import prune
from secateur.write import hub as uploads

SMALL: dict[str, Any] = {"calibration": "random", "samples": 8, "length": 16, "device": "cpu", "recovery": "none"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the client, with the files of all repositories. Its methods take the arguments of the real ones."""
    client = create_autospec(HfApi, instance=True, endpoint="https://hub", files={})

    def upload(*, repo_id: str, folder_path: Path, delete_patterns: list[str], **_: Any) -> None:
        kept = client.files.get(repo_id, {}).items()
        client.files[repo_id] = {
            **{name: data for name, data in kept if not any(fnmatch(name, pattern) for pattern in delete_patterns)},
            **{file.name: file.read_bytes() for file in folder_path.iterdir()},
        }

    client.upload_folder.side_effect = upload
    monkeypatch.setattr(uploads, "HfApi", lambda: client)
    return client


def test_a_folder_replaces_the_model_in_a_repository(tmp_path, checkpoint_folder, hub):
    """The repository is private, and shards of an earlier model are deleted."""
    hub.files["me/smaller"] = {"model-00001-of-00002.safetensors": b"old", "notes.md": b"mine"}
    watcher = Notes()
    prune(checkpoint_folder("llama"), tmp_path / "out", push_to_hub="me/smaller", watcher=watcher, **SMALL)
    assert "Uploaded to https://hub/me/smaller" in watcher.said
    hub.create_repo.assert_called_once_with("me/smaller", private=True, exist_ok=True)
    sent = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "README.md", "modeling_secateur.py"} < set(sent)
    assert hub.files["me/smaller"] == sent | {"notes.md": b"mine"}


@pytest.mark.parametrize(
    ("repo", "error", "said"),
    [
        ("smaller", None, "push-to-hub is 'smaller'; write owner/name"),
        ("me/../you", None, "write owner/name"),
        ("me/smaller", LocalTokenNotFoundError(), "nobody is logged in to the hub; run hf auth login first"),
        ("me/smaller", OSError("Invalid\ntoken"), "me/smaller: the hub does not accept an upload: Invalid"),
    ],
)
def test_a_wrong_upload_is_refused_before_any_work(repo, error, said, tmp_path, checkpoint_folder, hub):
    hub.whoami.side_effect = error
    assert_error(said, prune, checkpoint_folder("llama"), tmp_path / "out", push_to_hub=repo, **SMALL)
    assert not (tmp_path / "out").exists()
    assert not hub.create_repo.called


def test_a_failed_upload_keeps_the_output(tmp_path, checkpoint_folder, hub):
    hub.upload_folder.side_effect = OSError("Storage limit reached")
    said = r"is complete, but the upload failed: Storage.*try again with hf upload me/sm"
    assert_error(said, prune, checkpoint_folder("llama"), tmp_path / "out", push_to_hub="me/smaller", **SMALL)
    assert (tmp_path / "out" / "model.safetensors").is_file()
