"""YAML as job files use it: the core schema of YAML 1.2, read safely, every value with its line.

PyYAML speaks YAML 1.1, where `1e-4` is text, `no` is false, `010` is eight and the second of two equal keys wins in silence. Here
`1e-4` is a number, only true and false are booleans, and equal keys, tags and merge keys are refused. Anchors and aliases work.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray.config.hints import nearest_sibling
from rlhf_ray.errors import ConfigError, Problem

MAX_BYTES = 100_000
MAX_VALUES = 100_000

Loc = tuple[str | int, ...]


def dotted(loc: Sequence[str | int]) -> str:
    """`rewards[0].run` for ("rewards", 0, "run")."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


_TAG = "tag:yaml.org,2002:"
CORE_SCHEMA: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)


class JobLoader(yaml.SafeLoader):
    """SafeLoader with the core schema of YAML 1.2, which notes explicit tags instead of obeying them."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML fills it per class)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.tags: list[tuple[int, str]] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag is not None:
            self.tags.append((event.start_mark.line + 1, tag.replace(_TAG, "!!")))
            event.tag = None
        return super().compose_node(parent, index)


for _name, _pattern, _first in CORE_SCHEMA:
    JobLoader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), ["", *_first])


@dataclass(frozen=True)
class Document:
    """The values of a job file and the lines they stand on."""

    values: Any
    root: yaml.Node | None

    def line(self, loc: Loc) -> int | None:
        """Line of the value at `loc`, or of the innermost section that holds it; None if that is the whole file."""
        node, line = self.root, None
        for part in loc:
            child = _child(node, part)
            if child is None:
                break
            line, node = child
        return line


def _child(node: yaml.Node | None, part: str | int) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == part:
                return key.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark.line + 1, node.value[part]
    return None


def read_text(path: str | Path, what: str = "job file") -> str:
    """The text of a small UTF-8 file. Raises ConfigError: missing (with the nearest name), a folder, too large, not UTF-8."""
    name, file = str(path), Path(path)
    if os.path.isdir(file):  # unlike Path.is_dir it does not raise, whatever the name
        config = file / "config.yaml"
        fix = f"to repeat that run's job use {config}" if config.is_file() else ""
        raise ConfigError.at(name, "is a folder", f"a {what}", fix=fix)
    if not os.path.exists(file):
        if "=" in file.parts[0]:
            raise ConfigError.at(name, "is an override, and stands where a job file is expected", f"a {what} before it")
        raise ConfigError.at(name, "no such file", fix=nearest_sibling(file))
    if not file.is_file():
        raise ConfigError.at(name, "is not a regular file", f"a {what}")
    try:
        size = file.stat().st_size
        raw = file.read_bytes() if size <= MAX_BYTES else b""
    except OSError as error:
        raise ConfigError.at(name, f"cannot be read: {error.strerror}") from None
    if size > MAX_BYTES:
        raise ConfigError.at(name, f"is too large for a {what}", f"at most {MAX_BYTES:,} bytes", f"{size:,}")
    return decode(raw, name)


def decode(raw: bytes, where: str) -> str:
    """UTF-8, with or without a byte order mark."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ConfigError.at(where, "not UTF-8 (looks like UTF-16)", fix="re-save as UTF-8") from None
        line = raw.count(b"\n", 0, error.start) + 1
        bad = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        raise ConfigError.at(f"{where}:{line}", bad, fix="re-save as UTF-8") from None


def in_order(problems: Sequence[Problem]) -> list[Problem]:
    """Without repeats, by line; what has no line (a missing field, an override) comes last."""

    def line(problem: Problem) -> float:
        number = re.search(r":(\d+)(: |$)", problem.where)
        return int(number.group(1)) if number else math.inf

    return sorted(dict.fromkeys(problems), key=line)


def parse(text: str, where: str) -> Document:
    """The one document in `text`. Raises ConfigError that names `where` and the line of every problem."""
    try:
        loader = JobLoader(text)
        root = loader.get_single_node()
        tags = loader.tags
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_problem(error, text, where)) from None
    except RecursionError:
        raise ConfigError.at(where, "nested too deeply") from None
    builder = _Builder(where)
    builder.problems += [
        Problem(f"{where}:{line}", f"the tag {tag} is not allowed", fix="remove the tag; quote text that starts with !")
        for line, tag in tags
    ]
    values = builder.build(root) if root is not None else None
    ConfigError.raise_all(in_order(builder.problems))
    return Document(values, root)


def _syntax_problem(error: yaml.YAMLError, text: str, where: str) -> Problem:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark, what = error.problem_mark, ", ".join(x for x in (error.context, error.problem) if x)
        fix = "put quotes around text that holds : # [ ] { } & * ! | > % @ or starts with one"
        if "\t" in "".join(text.splitlines()[mark.line : mark.line + 1]):
            fix = "indent with spaces"
        return Problem(f"{where}:{mark.line + 1}", f"not valid YAML: {what} (column {mark.column + 1})", fix=fix)
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return Problem(f"{where}:{line}", f"not valid YAML: character U+{ord(text[error.position]):04X} is not allowed")
    return Problem(where, f"not valid YAML: {error}")


class _Builder:
    """Plain Python values from a node tree. Shared nodes (aliases) give shared values, so nothing is expanded here."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.problems: list[Problem] = []
        self._made: dict[int, tuple[Any, int]] = {}
        self._open: set[int] = set()

    def build(self, node: yaml.Node) -> Any:
        return self._build(node)[0]

    def _problem(self, node: yaml.Node, what: str, fix: str = "") -> None:
        self.problems.append(Problem(f"{self.where}:{node.start_mark.line + 1}", what, fix=fix))

    def _build(self, node: yaml.Node) -> tuple[Any, int]:
        """The value and how many values it holds with its aliases written out."""
        if id(node) in self._made:
            return self._made[id(node)]
        if id(node) in self._open:
            self._problem(node, "an alias inside the value that it names")
            return None, 1
        self._open.add(id(node))
        value: Any
        if isinstance(node, yaml.MappingNode):
            value, size = self._mapping(node)
        elif isinstance(node, yaml.SequenceNode):
            items = [self._build(child) for child in node.value]
            value, size = [v for v, _ in items], 1 + sum(n for _, n in items)
        else:
            value, size = self._scalar(node), 1
        self._open.discard(id(node))
        if size > MAX_VALUES:
            self._problem(node, f"aliases stand for more than {MAX_VALUES:,} values")
            value, size = None, 1
        self._made[id(node)] = (value, size)
        return value, size

    def _mapping(self, node: yaml.MappingNode) -> tuple[dict[str, Any], int]:
        values: dict[str, Any] = {}
        first: dict[str, int] = {}
        size = 1
        for key, child in node.value:
            value, n = self._build(child)
            size += n
            if not isinstance(key, yaml.ScalarNode):
                self._problem(key, "a field name must be a single word")
            elif key.value == "<<" and key.style is None:
                self._problem(key, "merge keys (<<) are not supported", "write the fields out")
            elif key.value in values:
                self._problem(
                    key, f"{key.value}: duplicate key; it stands on line {first[key.value]} already", "keep one"
                )
            else:
                values[key.value], first[key.value] = value, key.start_mark.line + 1
        return values, size

    def _scalar(self, node: yaml.Node) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if kind != "int":
            return text
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        try:
            return int(text, base)
        except ValueError:  # Python refuses thousands of digits
            self._problem(node, f"a number of {len(text)} digits")
            return None


@dataclass(frozen=True)
class Override:
    """`a.b=c` of the command line."""

    text: str
    path: tuple[str, ...]
    value: Any


def parse_override(text: str) -> Override:
    """Split `a.b=c`; c is read by the rules of job files. Raises ConfigError."""
    name, sign, value = text.partition("=")
    path = tuple(name.strip().split("."))
    where = f"override {text}"
    if not sign:
        raise ConfigError.at(where, "no value", "field=value, e.g. kl_coef=0.1")
    if not all(re.fullmatch(r"[A-Za-z_][\w-]*", part) for part in path):
        place = re.match(r"([\w.-]*?)(?:\.\d|\[)", name.strip())
        fix = f"override the list whole: {place[1]}=..." if place and place[1] else ""
        raise ConfigError.at(where, "not a field name before the =", "field=value or section.field=value", fix=fix)
    try:
        return Override(text, path, parse(value, where).values)
    except ConfigError as error:
        raise ConfigError([Problem(where, p.what, p.expected, p.got, p.fix) for p in error.problems]) from None


def apply_overrides(values: dict[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """A copy of `values` with the overrides set, the last one winning. Raises ConfigError where a path leads into no section."""
    result = dict(values)
    problems = []
    for override in overrides:
        section: Any = result
        for depth, part in enumerate(override.path[:-1]):
            inner = section.get(part)
            if inner is not None and not isinstance(inner, dict):
                kind = "a list" if isinstance(inner, list) else "a single value"
                whole = ".".join(override.path[: depth + 1])
                problems.append(
                    Problem(f"override {override.text}", f"{whole} is {kind}", fix=f"override it whole: {whole}=...")
                )
                break
            section[part] = dict(inner or {})  # a copy: aliases share sections
            section = section[part]
        else:
            section[override.path[-1]] = override.value
    ConfigError.raise_all(problems)
    return result
