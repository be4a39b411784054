"""Building HTML so that escaping cannot be forgotten: everything is escaped unless it is `Html` already."""

from __future__ import annotations

from html import escape
from typing import Any

from rlhf_ray.console import visible

VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})


class Html(str):
    """Markup. Made by `tag` and `join` alone, and by whoever vouches for what it holds."""

    __slots__ = ()


def join(*children: Any) -> Html:
    """Children in a row: None and False are left out, sequences are flattened, other values are escaped text."""
    return Html("".join(_markup(child) for child in children))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """`tag("p", "a < b", class_="note")` is `<p class="note">a &lt; b</p>`.

    In attribute names a trailing underscore is dropped and others become hyphens; None and False leave the attribute out, True
    writes it bare.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    body = "" if name in VOID else f"{join(*children)}</{name}>"
    return Html(f"<{name}{written}>{body}")


def _markup(child: Any) -> str:
    if child is None or child is False:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, (list, tuple)):
        return join(*child)
    return escape(visible(str(child)))


def _attribute(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(visible(str(value)))}"'
