"""Files beside the weights: JSON, text, and copies of what the dense model brings along."""

import json
import shutil
from pathlib import Path
from typing import Any


def write_text_or_json(path: Path, record: Any) -> None:
    """Write a file of text or JSON; a function gives either."""
    contents = record() if callable(record) else record
    if isinstance(contents, str):
        path.write_text(contents, encoding="utf-8", errors="backslashreplace")
    else:
        write_json(path, contents)


def write_json(path: Path, contents: Any) -> None:
    """Write a JSON file as people read it; half a surrogate pair stays the escape that it came as."""
    text = json.dumps(contents, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def copy_into(folder: Path, file: Path) -> None:
    """Copy a file, or a folder with all that is in it."""
    if file.is_dir():
        shutil.copytree(file, folder / file.name, dirs_exist_ok=True)
    else:
        shutil.copyfile(file, folder / file.name)
