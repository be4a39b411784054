"""Floats in state files as hexadecimal text: `float.hex` writes every bit, and JSON tools do not round it."""

from __future__ import annotations

import math


def parse(text: object) -> float:
    """The finite float that `float.hex` wrote as `text`.   Raises ValueError for anything else.

    `float.fromhex` alone would read the decimal text "0.2" as 0.125.

    >>> parse((0.2).hex())
    0.2
    """
    if isinstance(text, str) and text.removeprefix("-").startswith("0x"):
        value = float.fromhex(text)
        if math.isfinite(value):
            return value
    raise ValueError(f"expected a finite float in hexadecimal, such as '0x1.8p+1', got {text!r}")
