"""Uploads to a stand-in for the Hugging Face Hub on this machine."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from conftest import CheckpointFolder
from outputs import Notes
from secateur import prune
from secateur.base.errors import SecateurError

SMALL: dict[str, Any] = {"calibration": "random", "samples": 8, "length": 16, "device": "cpu", "recovery": "none"}


class Hub:
    """State of the stand-in: the repositories and their files."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.full = False


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Start the stand-in, with the user `me` logged in."""
    state = Hub()

    class Answers(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, found: Any, code: int = 200) -> None:
            body = json.dumps(found).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.headers["Authorization"] != "Bearer hf_right":
                return self.answer({"error": "Invalid token"}, 401)
            if self.path.startswith("/api/whoami"):
                return self.answer({"name": "me", "type": "user"})
            repo = "/".join(self.path.split("/")[3:5])
            return self.answer([{"type": "file", "path": name, "size": 1, "oid": "0"} for name in state.files[repo]])

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
                state.private[repo] = asked.get("private") or asked.get("visibility") == "private"
                state.files.setdefault(repo, {})
                return self.answer({"url": f"https://huggingface.co/{repo}", "id": repo, "name": repo})
            repo = "/".join(self.path.split("/")[3:5])
            if "/preupload/" in self.path:
                files = json.loads(body)["files"]
                ways = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
                return self.answer({"files": ways})
            if self.path.endswith("/validate-yaml"):
                return self.answer({"errors": [], "warnings": []})
            if state.full:
                return self.answer({"error": "Storage limit reached"}, 403)
            for line in body.splitlines():
                part = json.loads(line)
                if part["key"] == "file":
                    state.files[repo][part["value"]["path"]] = base64.b64decode(part["value"]["content"])
                if part["key"] == "deletedFile":
                    del state.files[repo][part["value"]["path"]]
            url = f"https://huggingface.co/{repo}/commit/1"
            return self.answer({"commitUrl": url, "commitOid": "1", "success": True})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield state
    server.shutdown()


def test_a_folder_replaces_the_model_in_a_repository(
    tmp_path: Path, checkpoint_folder: CheckpointFolder, hub: Hub
) -> None:
    """The repository is private, and shards of an earlier model are deleted."""
    hub.files["me/smaller"] = {"model-00001-of-00002.safetensors": b"old", "notes.md": b"mine"}
    watcher = Notes()
    prune(checkpoint_folder("llama"), tmp_path / "out", push_to_hub="me/smaller", watcher=watcher, **SMALL)
    assert f"Uploaded to {constants.ENDPOINT}/me/smaller" in watcher.said
    assert hub.private == {"me/smaller": True}
    sent = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "README.md", "modeling_secateur.py"} < set(sent)
    assert hub.files["me/smaller"] == sent | {"notes.md": b"mine"}


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [
        ("smaller", "hf_right", "push-to-hub is 'smaller'; write owner/name"),
        ("me/../you", "hf_right", "write owner/name"),
        ("me/smaller", "", "nobody is logged in to the hub; run hf auth login first"),
        ("me/smaller", "hf_wrong", "me/smaller: the hub does not accept an upload: Invalid"),
    ],
)
def test_a_wrong_upload_is_refused_before_any_work(
    repo: str,
    token: str,
    said: str,
    tmp_path: Path,
    checkpoint_folder: CheckpointFolder,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(SecateurError, match=said):
        prune(checkpoint_folder("llama"), tmp_path / "out", push_to_hub=repo, **SMALL)
    assert not (tmp_path / "out").exists()
    assert not hub.files


def test_a_failed_upload_keeps_the_output(tmp_path: Path, checkpoint_folder: CheckpointFolder, hub: Hub) -> None:
    hub.full = True
    with pytest.raises(SecateurError, match=r"is complete, but the upload failed: .*try again with hf upload me/sm"):
        prune(checkpoint_folder("llama"), tmp_path / "out", push_to_hub="me/smaller", **SMALL)
    assert (tmp_path / "out" / "model.safetensors").is_file()
