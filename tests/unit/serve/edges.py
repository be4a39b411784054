"""Numbers at which a bound, or arithmetic in float32, may break, for every numeric field of a request: from its own bounds."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

FLOATS = (
    *(0.0, 5e-324, 1e-50, 1.4e-45, 1.1754942e-38, 1.17549435e-38, 1e-7, 1e-4),
    *(1 - 1e-16, 1 - 6e-8, 1.0, 1 + 2.3e-16, 1 + 1.2e-7, 3.4028235e38, 1e39, 1.7976931348623157e308),
)
"""0 in float32 or almost, its smallest denormal and normal numbers, 1 in float32 or almost, its largest number and beyond."""
INTS = (0, 1, 2, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 10**30)


BOUNDS: dict[str, Callable[[float, float], bool]] = {
    "ge": operator.ge,
    "gt": operator.gt,
    "le": operator.le,
    "lt": operator.lt,
}


@dataclass(frozen=True)
class Number:
    """A number somewhere in a field. bounds: (of BOUNDS, limit).   wrap: from it to a value of the field."""

    kind: type
    bounds: tuple[tuple[str, Any], ...] = ()
    wrap: Callable[[Any], Any] = lambda x: x

    def allows(self, x: float) -> bool:
        return all(BOUNDS[name](x, limit) for name, limit in self.bounds)

    def values(self) -> list[Any]:
        """With both signs, and with each bound and its neighbours."""
        found: list[Any] = [sign * x for x in (FLOATS if self.kind is float else INTS) for sign in (1, -1)]
        for _, limit in self.bounds:
            beside = (math.nextafter(limit, -math.inf), math.nextafter(limit, math.inf))
            found += [self.kind(limit), *(beside if self.kind is float else (limit - 1, limit + 1))]
        return list(dict.fromkeys(found))


def numbers(
    annotation: Any, metadata: tuple[Any, ...] = (), wrap: Callable[[Any], Any] = lambda x: x
) -> Iterator[Number]:
    """All that an annotation holds: alone, in a union, in a list, as values of a dict with token ids as keys."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [m for part in args[1:] for m in (part.metadata if isinstance(part, FieldInfo) else [part])]
        yield from numbers(args[0], (*metadata, *inner), wrap)
    elif origin in (Union, UnionType):
        for arg in args:
            yield from numbers(arg, metadata, wrap)
    elif origin is list:
        yield from numbers(args[0], (), lambda x: wrap([x]))
    elif origin is dict:
        yield from numbers(args[1], (), lambda x: wrap({"5": x}))
    elif annotation in (int, float):
        yield Number(annotation, tuple((b, getattr(m, b)) for m in metadata for b in BOUNDS if hasattr(m, b)), wrap)


def numeric_fields(model: type[BaseModel]) -> dict[str, list[Number]]:
    """name -> its numbers, of every field of `model` that has any."""
    fields = model.model_fields.items()
    found = {name: list(numbers(field.annotation, tuple(field.metadata))) for name, field in fields}
    return {name: own for name, own in found.items() if own}


def told_numeric(schema: Any) -> bool:
    """Whether a JSON schema holds a number, models that it refers to left aside."""
    if isinstance(schema, list):
        return any(map(told_numeric, schema))
    if not isinstance(schema, dict):
        return False
    return schema.get("type") in ("number", "integer") or any(
        told_numeric(part) for key, part in schema.items() if key not in ("$defs", "default")
    )
