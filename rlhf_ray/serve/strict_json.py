"""JSON as RFC 8259 has it, and in text that UTF-8 can say. Python reads more, and then fails where it has to be written again."""

from __future__ import annotations

import json
import math
from typing import Any


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text[:20]} is no number that can be written again")
    return number


DECODER = json.JSONDecoder(parse_constant=_reject_constant, parse_float=_finite)


def check_utf8(values: Any) -> None:
    """ValueError for a lone surrogate, which escapes may hide, and which is no text."""
    json.dumps(values, ensure_ascii=False).encode("utf-8")


def load_json(text: str) -> Any:
    """ValueError for anything else, NaN and Infinity among it; RecursionError for what is nested too deeply.

    >>> load_json('{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    """
    values = DECODER.decode(text)
    if "\\u" in text:
        check_utf8(values)
    return values
