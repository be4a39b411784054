"""Numbers as a reader wants them, by unit."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlhf_ray.console import duration
from rlhf_ray.metrics import figure

MINUS = "\N{MINUS SIGN}"


def shown(value: float, unit: str = "") -> str:
    """`value` with its unit where the unit changes the number: shares in per cent, seconds, bytes."""
    if unit == "share":
        return percent(value)
    if unit == "s":
        return duration(value)
    if unit == "bytes":
        return size(value)
    whole = 10 <= abs(value) < 1e9 and float(value).is_integer()
    return figure(int(value) if whole else value).replace("-", MINUS)


def count(number: int, noun: str) -> str:
    """`1 step`, `3,000 steps`."""
    return f"{number:,} {noun if number == 1 else noun + 's'}"


def with_error(value: float, error: float, unit: str = "") -> str:
    """`1.62 ± 0.06`: the error to one digit (two if it starts with 1), the value to the same decimals.
    An error that is not known (NaN) is left out."""
    if not error > 0 or unit in ("s", "bytes"):
        return shown(value, unit)
    scale, suffix = (100.0, "%") if unit == "share" else (1.0, "")
    power = math.floor(math.log10(error * scale))
    decimals = max(0, -power + (error * scale < 2 * 10.0**power))
    number = f"{value * scale:.{decimals}f}{suffix}".replace("-", MINUS)
    return f"{number} ± {error * scale:.{decimals}f}"


def percent(share: float) -> str:
    text = f"{100 * share:.1f}".replace("-", MINUS)
    return f"{text.removesuffix('.0')}%"


def size(count: float) -> str:
    """Bytes in powers of 1000, as file managers show them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers in [low, high], at a distance of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def tick_labels(values: Sequence[float], unit: str = "") -> list[str]:
    """One label per tick, all with the decimals their distance asks for."""
    if not values:
        return []
    scale, suffix = (100.0, "%") if unit == "share" else (1.0, "")
    largest = max(abs(v) for v in values) * scale
    if unit == "bytes":
        return [size(v) if v else "0" for v in values]
    if 0 < largest < 0.001 or largest >= 1e9:
        return [_exponent(v * scale) for v in values]
    if largest >= 10_000:
        scale, suffix = (scale / 1e6, "M") if largest >= 1e6 else (scale / 1e3, "k")
    gap = abs(values[1] - values[0]) * scale if len(values) > 1 else abs(values[0]) * scale
    decimals = next((d for d in range(5) if abs(round(gap, d) - gap) < 1e-6 * max(gap, 1e-9)), 5) if gap else 0
    return [f"{v * scale:.{decimals}f}".replace("-", MINUS) + suffix for v in values]


def _exponent(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", MINUS)
