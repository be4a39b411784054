"""What the configuration classes say about themselves: types in words, fields by path, the rows of `--help`."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlhf_ray.config.sections import Section, _one_or_many


@dataclass(frozen=True)
class FieldRow:
    """One line of `--help`. `default` is as a job file writes it, or `required`."""

    name: str
    type: str
    default: str
    meaning: str


def describe(cls: type[Section]) -> list[FieldRow]:
    """Every field of a configuration class under its dotted name, sections opened; a list of sections is `rewards[].run`.

    Required fields come first. A kind of section that repeats inside another (value.lora, lora) is opened once."""
    return list(_rows(cls, "", set()))


def _rows(cls: type[Section], prefix: str, opened: set[type[Section]]) -> Iterator[FieldRow]:
    for name, info in sorted(cls.model_fields.items(), key=lambda item: not item[1].is_required()):
        inner, many = section_of(info.annotation)
        meaning = info.description or ""
        yield FieldRow(prefix + name, kind(info), _default(info), meaning)
        if inner is not None and not (prefix and inner in opened):
            opened.add(inner)  # value.lora has the fields of lora: once is enough
            yield from _rows(inner, f"{prefix}{name}{'[]' if many else ''}.", opened)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    if isinstance(info.default, Section):
        return "{}"
    return show(info.default)


def show(value: Any) -> str:
    """A value as a job file writes it, shortened to one line."""
    return shorten(_show(value))


def shorten(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.12g}".replace("e-0", "e-").replace("e+0", "e+")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_show(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_show, value)) + "]"
    return str(value)


def section_of(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section class that a field holds, if any, and whether it holds a list of them."""
    origin, args = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    if origin is Annotated:
        return section_of(args[0])
    if origin is tuple:
        return section_of(args[0])[0], True
    if origin in (Union, types.UnionType):
        return next((found for a in args if (found := section_of(a))[0]), (None, False))
    return None, False


def find(cls: type[Section], loc: Sequence[str | int]) -> tuple[Any, FieldInfo | None]:
    """The annotation and field of the value at `loc`; items of a list have the annotation of one item. (None, None) if unknown."""
    section: type[Section] | None = cls
    annotation: Any = cls
    info: FieldInfo | None = None
    for part in loc:
        if isinstance(part, int):
            annotation = _item(annotation)
        elif section is not None and part in section.model_fields:
            info = section.model_fields[part]
            annotation = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        else:
            return None, None
        section = section_of(annotation)[0]
    return annotation, info


def _item(annotation: Any) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _item(args[0])
    if origin is tuple:
        return args[0]
    if origin in (Union, types.UnionType):
        return next((found for a in args if (found := _item(a)) is not None), None)
    return None


def kind(field: Any) -> str:
    """The type of a field (or annotation) in words: `number > 0`, `one of a, b`, `text or list of texts`."""
    if isinstance(field, FieldInfo):
        return _kind(field.annotation, field.metadata)
    return _kind(field, ())


def _kind(annotation: Any, metadata: Sequence[Any]) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(args[0], [*args[1:], *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(a, ()) for a in args))
    if origin is Literal:
        return f"one of {', '.join(map(_show, args))}" if len(args) > 1 else _show(args[0])
    if origin is tuple:
        one = _kind(args[0], ())
        many = (
            f"list of {one}"
            if one.startswith("one of")
            else f"list of {one.replace(' ', 's ', 1) if ' ' in one else one + 's'}"
        )
        single = any(isinstance(m, BeforeValidator) and m.func is _one_or_many for m in metadata)
        return f"{one} or {many}" if single and not one.startswith("one of") else many
    if annotation in (int, float):
        return _with_bounds("integer" if annotation is int else "number", metadata)
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return {str: "text", bool: "true or false"}.get(annotation, "mapping" if origin is dict else "value")


def _with_bounds(name: str, metadata: Sequence[Any]) -> str:
    bounds: dict[str, Any] = {}
    for item in _flat(metadata):
        bounds.update({k: getattr(item, k) for k in ("ge", "gt", "le", "lt") if getattr(item, k, None) is not None})
    if {"ge", "le"} <= bounds.keys():
        return f"{name} from {bounds['ge']} to {bounds['le']}"
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = [f"{signs[k]} {'2^63' if bounds[k] == 2**63 else bounds[k]}" for k in signs if k in bounds]
    return f"{name} {' and '.join(limits)}".strip()


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from item.metadata
        else:
            yield item


def default_of(info: FieldInfo | None) -> Any:
    """The default of an optional field; None as well for a required one or no field."""
    return None if info is None or info.default is PydanticUndefined else info.default
