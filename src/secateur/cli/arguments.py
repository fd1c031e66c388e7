"""Arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A Hugging Face folder, a hub id (owner/name), or a .gguf file.", show_default=False
    ),
]
PrunedFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder that secateur prune wrote.", show_default=False)
]
OutFolder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)]
