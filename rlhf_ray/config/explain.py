"""pydantic's findings, told as problems of a job file: one line each, with what was expected and how to mend it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlhf_ray.config.hints import did_you_mean, unknown_key
from rlhf_ray.config.schema import default_of, find, kind, section_of, show
from rlhf_ray.config.sections import Section
from rlhf_ray.config.yaml_reader import Loc, dotted, parse
from rlhf_ray.errors import ConfigError, Problem

_MISSING = object()
_IN_VALUE = ("out of range", "empty", "malformed")  # the type is right: the member of the union that was meant
Where = Callable[[Loc], str]


def problems(error: ValidationError, cls: type[Section], values: Mapping[str, Any], where: Where) -> list[Problem]:
    """One problem per field that pydantic found fault with; `values` is what was validated, `where` names places."""
    details = [(real_loc(e["loc"], cls, values), e) for e in error.errors(include_url=False)]
    details = [(loc, e) for loc, e in details if e["type"] != "too_short" or not _has_others(loc, e, details)]
    found: list[Problem] = []
    seen: set[Loc] = set()
    for loc, detail in details:
        of_union = len(detail["loc"]) > len(loc)
        if of_union and (loc in seen or any(_is_inside(other, loc) for other, _ in details)):
            continue  # the other members of a union, where one member already tells the problem
        seen.add(loc)
        if detail["type"] == "value_error":
            found += _rule_problems(detail, cls, loc, where)
        elif detail["type"] == "extra_forbidden":
            found.append(_unknown(cls, loc, where))
        else:
            whats = [_what(d["type"]) for other, d in details if other == loc]
            what = whats[0] if len(whats) == 1 else next((w for w in whats if w in _IN_VALUE), "wrong type")
            found.append(_value_problem(detail, what, cls, loc, values, where))
    return found


def in_python(error: ValidationError, cls: type[Section], values: Mapping[str, Any]) -> ConfigError:
    """What is raised where `cls(**values)` is called: the same problems as for a job file, at `PPOConfig: rewards[0].run`."""

    def where(loc: Loc) -> str:
        return ": ".join(part for part in (cls.__name__, dotted(loc)) if part)

    return ConfigError(problems(error, cls, values, where))


def _is_inside(loc: Loc, section: Loc) -> bool:
    return len(loc) > len(section) and loc[: len(section)] == section


def _has_others(loc: Loc, detail: ErrorDetails, details: Sequence[tuple[Loc, ErrorDetails]]) -> bool:
    """A list whose items are all bad is also told to be too short."""
    return any(d is not detail and (other == loc or _is_inside(other, loc)) for other, d in details)


def real_loc(loc: Sequence[str | int], cls: type[Section], values: Any) -> Loc:
    """pydantic's location without the names of union members."""
    real: list[str | int] = []
    section: type[Section] | None = cls
    value: Any = values
    for part in loc:
        if isinstance(part, int):
            keep = isinstance(value, (list, tuple)) and part < len(value)
        else:
            keep = isinstance(value, Mapping) and (
                part in value or (section is not None and part in section.model_fields)
            )
        if not keep:
            continue
        real.append(part)
        value = value[part] if isinstance(part, int) else value.get(part, _MISSING)
        section = section_of(find(cls, real)[0])[0]
    return tuple(real)


def _value_at(values: Any, loc: Loc) -> Any:
    for part in loc:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return _MISSING
    return values


def _unknown(cls: type[Section], loc: Loc, where: Where) -> Problem:
    annotation = find(cls, loc[:-1])[0] if loc[:-1] else cls
    section = section_of(annotation)[0] or cls
    prefix = ".".join(str(p) for p in loc[:-1] if isinstance(p, str))
    return Problem(where(loc), "unknown key", fix=unknown_key(cls, section, prefix, str(loc[-1])))


def _rule_problems(detail: ErrorDetails, cls: type[Section], loc: Loc, where: Where) -> list[Problem]:
    """A rule of ours that spans fields: its text may hold several problems, each naming its field first."""
    section = section_of(find(cls, loc)[0])[0] if loc else cls
    result = []
    for text in str(detail["ctx"]["error"]).split(" | "):
        name = re.match(r"[a-z_0-9]+(\.[a-z_0-9]+)*", text)
        path = tuple(name.group().split(".")) if name else ()
        if section is None or not path or path[0] not in section.model_fields:
            result.append(Problem(where(loc), text))
            continue
        at = where((*loc, *path))
        result.append(Problem(at, text.removeprefix(f"{name.group()}: ") if name else text))
    return result


def _value_problem(detail: ErrorDetails, what: str, cls: type[Section], loc: Loc, values: Any, where: Where) -> Problem:
    annotation, info = find(cls, loc)
    value = _value_at(values, loc)
    meaning = (info.description if info is not None else None) or ""
    if detail["type"] == "missing" or value is _MISSING:
        return Problem(where(loc), "missing", kind(annotation) + (f" ({meaning})" if meaning else ""))
    if detail["type"] == "none_required":
        return Problem(where(loc), meaning or "cannot be set", got=show(value), fix="drop it")
    if detail["type"] == "string_pattern_mismatch":
        return Problem(where(loc), what, f"{meaning}, matching {detail['ctx']['pattern']}", repr(value))
    fix = _fix(annotation, default_of(info), value, what)
    return Problem(where(loc), what, _expected(annotation), _got(value), fix)


def _expected(annotation: Any) -> str:
    section, many = section_of(annotation)
    if section is None:
        return kind(annotation)
    fields = ", ".join(list(section.model_fields)[:4])
    return f"a {'list of sections' if many else 'section'} with fields {fields}, ..."


def _what(error_type: str) -> str:
    if error_type == "literal_error":
        return "not a choice"
    if error_type in ("too_short", "string_too_short"):
        return "empty"
    if error_type.startswith(("greater_than", "less_than", "finite")):
        return "out of range"
    return "malformed" if error_type == "string_pattern_mismatch" else "wrong type"


def _got(value: Any) -> str:
    return repr(value) if isinstance(value, str) and len(value) < 80 else show(value)


def _fix(annotation: Any, default: Any, value: Any, what: str) -> str:
    words = kind(annotation)
    if what == "not a choice":
        choices = [c for c in _choices(annotation) if c != "none"]  # off is no spelling of what was asked for
        return did_you_mean(value, choices) if isinstance(value, str) else ""
    if words == "list of sections" and isinstance(value, Mapping):
        return "make it a list: put - before its first field"
    if what == "wrong type" and isinstance(value, str) and (section := section_of(annotation)[0]) is not None:
        needed = [name for name, field in section.model_fields.items() if field.is_required()]
        short = section.short_form or (needed[0] if len(needed) == 1 else None)
        one = f"{{{short}: {value}}}"
        return "" if short is None else f"write {f'[{one}]' if words == 'list of sections' else one}"
    if words == "list of sections" and callable(value):
        return "make it a list: [...]"
    if isinstance(value, str):
        if "true or false" in words and value.lower() in ("yes", "no", "on", "off", "true", "false", "y", "n"):
            return f"write {'true' if value.lower() in ('yes', 'on', 'true', 'y') else 'false'}"
        if ("number" in words or "integer" in words) and _is_number(value):
            return "write it without quotes"
        if "number" in words or "integer" in words:
            digits = value.replace("_", "").replace(",", "")
            return f"write {digits}" if digits != value and _is_number(digits) else _default_hint(default)
        if words.startswith("list of"):
            return f"write [{', '.join(part.strip() for part in value.split(','))}]"
    if "text" in words and isinstance(value, (bool, int, float)):
        return f'write "{show(value)}"'
    return _default_hint(default) if what in ("out of range", "wrong type") else ""


def _choices(annotation: Any) -> list[str]:
    found: list[str] = []
    for arg in get_args(annotation):
        found += [arg] if isinstance(arg, str) else _choices(arg)
    return found


def _is_number(text: str) -> bool:
    try:
        value = parse(text, "").values
    except ConfigError:
        return False
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _default_hint(default: Any) -> str:
    if default is None or isinstance(default, (Section, Mapping)):
        return ""
    return f"the default is {show(default)}"
