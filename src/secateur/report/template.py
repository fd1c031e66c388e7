"""The jinja2 templates of the model card and of the pages, which are files in this folder."""

import re
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape


def fill(template: str, /, **values: Any) -> str:
    """Return the text of a template with values in its places; a place without a value is an error."""
    return _TEMPLATES.get_template(template).render(values)


def _plain(text: str) -> str:
    """Return text on one line in which Markdown and HTML are escaped."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", escape(" ".join(text.split()), quote=False))


def _code(text: str) -> str:
    """Return text on one line that cannot end a code span of Markdown."""
    return " ".join(text.replace("`", "'").split())


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    # In pages, all text from models and users is escaped.
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {"plain": _plain, "code": _code}
_TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
