"""Write a table into a Markdown file, in place of the previous one."""

import re
from pathlib import Path


def put(path: Path, name: str, lines: list[str]) -> None:
    """Replace the lines between the markers; add the markers at the end of the file (or a new file) where missing."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if opening not in text:
        text = f"{text.rstrip()}\n\n{opening}{closing}\n".lstrip()
    marked = re.compile(f"({re.escape(opening)}).*?({re.escape(closing)})", re.DOTALL)
    table = "\n".join(lines) + "\n"
    path.write_text(marked.sub(lambda match: match[1] + table + match[2], text), encoding="utf-8")
