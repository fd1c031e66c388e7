"""A table of figures inside a Markdown file, replaced as its rows come."""

import re
from pathlib import Path


def put(path: Path, name: str, lines: list[str]) -> None:
    """Replace what stands between the markers, or add both at the end of the file, which need not be there."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if opening not in text:
        text = f"{text.rstrip()}\n\n{opening}{closing}\n".lstrip()
    marked = re.compile(f"({re.escape(opening)}).*?({re.escape(closing)})", re.DOTALL)
    table = "\n".join(lines) + "\n"
    path.write_text(marked.sub(lambda match: match[1] + table + match[2], text), encoding="utf-8")
