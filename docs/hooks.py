"""For mkdocs: what a page links to outside of the docs is told by its path, as nothing is there."""

from __future__ import annotations

import re
from typing import Any

# Text, then a path that leaves this directory.
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _OUTSIDE.sub(_told, markdown)


def _told(link: re.Match[str]) -> str:
    text, path = link[1].strip("`"), link[2]
    return f"`{path}`" if path.endswith(text) else f"{text} (`{path}`)"
