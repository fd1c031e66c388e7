"""Files next to the weights: JSON, text, and copies of files of the dense model."""

import json
import shutil
from pathlib import Path
from typing import Any


def write_text_or_json(path: Path, contents: Any) -> None:
    """Write text as it is, or anything else as JSON; a function is called for its contents."""
    contents = contents() if callable(contents) else contents
    if isinstance(contents, str):
        path.write_text(contents, encoding="utf-8", errors="backslashreplace")
    else:
        write_json(path, contents)


def write_json(path: Path, contents: Any) -> None:
    """Write an indented JSON file in UTF-8; an unpaired surrogate stays an escape sequence."""
    text = json.dumps(contents, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def copy_into(folder: Path, file: Path) -> None:
    """Copy a file, or a folder with everything in it, into a folder."""
    if file.is_dir():
        shutil.copytree(file, folder / file.name, dirs_exist_ok=True)
    else:
        shutil.copyfile(file, folder / file.name)
