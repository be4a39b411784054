"""The playground: one static page, without anything from the network."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files


class Page:
    """html: the page.  policy: a browser that honours it runs this page's own script and style, and talks to this service alone."""

    def __init__(self) -> None:
        self.html = (files(__name__) / "index.html").read_text(encoding="utf-8")
        script, style = (_hash(_inside(self.html, tag)) for tag in ("script", "style"))
        self.policy = (
            f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; base-uri 'none';"
            " form-action 'none'; frame-ancestors 'none'"
        )


def _inside(html: str, tag: str) -> str:
    (found,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return str(found)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
