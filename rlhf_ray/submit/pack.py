"""What travels with a job: the job file, the code and small files that it names, the package where the nodes lack it. Nothing else.

The list is made of what the job names, so run folders, models, other files of the working folder and what lies in the environment
are never in it. A path that does not travel is made absolute, and must be readable on every node.
"""

from __future__ import annotations

import ast
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ray.config import JobFields
from rlhf_ray.config.load import dump_yaml
from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.config.uris import is_uri
from rlhf_ray.config.yaml_reader import Loc, dotted
from rlhf_ray.errors import ConfigError, Problem
from rlhf_ray.submit import secrets
from rlhf_ray.submit.places import Kind, replaced

JOB = "rlhf_ray_job.yaml"
ELSEWHERE = "rlhf_ray_files"
"""Folder of the package for files from outside of the working folder."""
LIMIT_BYTES = 1_000_000
MOST_READ = 50_000_000
"""A larger data file is not even tried."""
_SUFFIX = re.compile(r"(?i).*\.(jsonl?|csv|parquet)(\.gz)?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_STEP = re.compile(r"@\d+$")
SUFFIXES = {".py", ".json", ".html", ".css", ".js", ".txt", ".typed"}
"""Files of the package itself."""


@dataclass(frozen=True)
class Need:
    """What every node must be able to read.   field: of the job.   kind: file, folder, uri, or module (a name to import)."""

    field: str
    kind: str
    path: str


@dataclass
class Parcel:
    """A job ready to be sent.   values: of the job file.   files: name in the package -> content.   stop_s: seconds that a stop may
    take."""

    command: str
    name: str
    values: dict[str, Any]
    output_dir: str
    stop_s: int
    files: dict[str, bytes] = field(default_factory=dict)
    needs: list[Need] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def write(self, path: Path, with_package: bool) -> int:
        """The archive that Ray unpacks as the working folder; equal content gives equal bytes. Returns its size."""
        content = {**self.files, JOB: dump_yaml(self.values).encode()}
        if with_package:
            content |= package_files()
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name in sorted(content):
                entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
                entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                archive.writestr(entry, content[name])
        return path.stat().st_size


def package_files() -> dict[str, bytes]:
    """Name in an archive -> content of each file of this package."""
    root = Path(__file__).parents[1]
    files = (p for p in sorted(root.rglob("*")) if p.suffix in SUFFIXES and "__pycache__" not in p.parts)
    return {str(p.relative_to(root.parent)): p.read_bytes() for p in files}


def make(
    command: str, config: JobFields | ServeConfig, storage: str | None = None, limit_bytes: int = LIMIT_BYTES
) -> Parcel:
    """The parcel of a job.   storage: the folder that relative paths mean on the cluster; default: the working folder.

    Raises ConfigError: a file that is missing or holds a secret, or more than `limit_bytes`, compressed, of what has to travel
    besides this package."""
    packer = _Packer(storage, limit_bytes)
    given = config.model_dump(mode="json", exclude_unset=True)
    values = replaced(command, given, packer.visit)
    ConfigError.raise_all(packer.problems)
    packer.take_data()
    values = replaced(command, values, packer.settle)
    if isinstance(config, ServeConfig):
        name, stop = Path(values["output_dir"]).name, config.limits.request_timeout_s + 30
    else:
        name, stop = config.run_name or Path(values["output_dir"]).name, config.stop_grace_s + 15
        values["resume"] = "auto"
    for archived, content in packer.files.items():
        packer.problems += secrets.problems(archived, content)
    packer.problems += secrets.problems("the job", dump_yaml(values).encode())
    ConfigError.raise_all(dict.fromkeys(packer.problems))
    own = values["output_dir"] + "/"  # what the job makes itself
    needs = [need for need in packer.needs if not f"{need.path}/".startswith(own)]
    parcel = Parcel(command, name, values, values["output_dir"], int(stop), packer.files, needs, packer.left)
    if packer.free < 0:
        raise ConfigError.at(
            "package",
            f"the job's files that have to travel take {limit_bytes - packer.free:,} bytes, packed",
            f"at most {limit_bytes:,}",
            fix=f"raise --max-package, or put them on shared storage: {', '.join(packer.files)}",
        )
    return parcel


class _Packer:
    """Two rounds over the job's paths: the first decides what each of them is, the second writes where it will be."""

    def __init__(self, storage: str | None, limit_bytes: int) -> None:
        self.root = os.path.abspath(storage or ".")
        self.files: dict[str, bytes] = {}
        self.needs: list[Need] = []
        self.left: list[str] = []
        self.problems: list[Problem] = []
        self.free = limit_bytes
        self._data: dict[str, tuple[Loc, str]] = {}  # name in the package -> field, path here

    def visit(self, loc: Loc, kind: Kind, text: str) -> str:
        """First round: code and small texts are packed, data files noted, everything else made absolute."""
        if kind == "data" and is_uri(text):
            return self._uri(loc, text)
        if is_uri(text):
            fix = "mount that storage on every node, or copy it there; runs are copied to it by copy_to"
            self.problems.append(Problem(dotted(loc), "is a URI", "a path, or an id of the Hub", text, fix))
            return text
        text = os.path.expanduser(text)
        if kind == "function":
            return self._function(loc, text)
        if kind == "text":
            return self._text(loc, text)
        if kind == "data":
            return self._data_file(loc, text)
        if kind == "model" and not _is_path(text):
            return text
        path = self.there(text)
        if kind == "keys":
            self.needs.append(Need(dotted(loc), "file", path))
        elif kind in ("folder", "model"):
            self.needs.append(Need(dotted(loc), "folder", _STEP.sub("", path)))
        return path

    def settle(self, loc: Loc, kind: Kind, text: str) -> str:
        """Second round: data files that did not fit are named by their path on the nodes."""
        if kind != "data" or text not in self._data:
            return text
        return text if text in self.files else self.there(self._data[text][1])

    def there(self, path: str) -> str:
        """What `path` means on the cluster; an absolute one is the same there."""
        return os.path.normpath(os.path.join(self.root, path))

    def take_data(self) -> None:
        """Pack data files, the smallest first, as long as there is room; the others have to be on the nodes."""
        sized = sorted(self._data.items(), key=lambda item: os.path.getsize(item[1][1]))
        for name, (loc, path) in sized:
            content = Path(path).read_bytes() if os.path.getsize(path) <= MOST_READ else None
            size = _compressed([content]) if content is not None else self.free + 1
            if content is not None and size <= self.free:
                self._put(name, content)
            else:
                self.left.append(name)
                self.needs.append(Need(dotted(loc), "file", self.there(path)))

    def _put(self, name: str, content: bytes) -> None:
        if name not in self.files:
            self.files[name] = content
            self.free -= _compressed([content])

    def _text(self, loc: Loc, text: str) -> str:
        if not os.path.isfile(text):
            self.problems.append(Problem(dotted(loc), "no such file", got=text))
            return text
        name = _archived(text)
        self._put(name, Path(text).read_bytes())
        return name

    def _data_file(self, loc: Loc, text: str) -> str:
        if os.path.isfile(text):
            name = _archived(text)
            self._data[name] = (loc, text)
            return name
        if not _SUFFIX.fullmatch(text) and not _is_path(text):
            return text  # a data set of the Hub
        path = self.there(text)
        self.needs.append(Need(dotted(loc), "file", path))
        return path

    def _uri(self, loc: Loc, text: str) -> str:
        self.needs.append(Need(dotted(loc), "uri", text))
        return text

    def _function(self, loc: Loc, text: str) -> str:
        place, _, name = text.rpartition(":")
        if not place.endswith(".py"):
            top = place.split(".")[0]
            found = list(_modules_here(top))
            if not found:
                self.needs.append(Need(dotted(loc), "module", place))
            for file in found:
                self._code(file)
            return text
        if not os.path.isfile(place):
            self.problems.append(Problem(dotted(loc), "no such file", got=place))
            return text
        return f"{self._code(Path(place))}:{name}"

    def _code(self, file: Path) -> str:
        """Pack a Python file, and the modules of the working folder that it imports."""
        archived, content = _archived(str(file)), file.read_bytes()
        if archived in self.files:
            return archived
        self._put(archived, content)
        try:
            tree = ast.parse(content)
        except (SyntaxError, ValueError):  # the stage's own check tells that
            return archived
        for top in _imported(tree):
            for other in _modules_here(top):
                self._code(other)
        return archived


def _imported(tree: ast.AST) -> Iterator[str]:
    """First parts of the names of all modules that are imported, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def _modules_here(top: str) -> Iterator[Path]:
    """The Python files of module `top` in the working folder, which is where imports look first. This package is none of them."""
    if top == "rlhf_ray" or not top.isidentifier():
        return
    if os.path.isfile(f"{top}.py"):
        yield Path(f"{top}.py")
    elif os.path.isdir(top):
        yield from (p for p in sorted(Path(top).rglob("*.py")) if "__pycache__" not in p.parts)


def _archived(path: str) -> str:
    """Name in the package: as the job writes it where it lies under the working folder."""
    inside = os.path.relpath(os.path.abspath(path), os.getcwd())
    if not inside.startswith(".."):
        return inside
    folder = f"{zlib.crc32(os.path.dirname(os.path.abspath(path)).encode()):08x}"
    return f"{ELSEWHERE}/{folder}/{os.path.basename(path)}"


def _is_path(text: str) -> bool:
    """Not a Hub id: absolute, explicit, deep, or something that is there."""
    name = _STEP.sub("", text)
    return not _HUB_ID.fullmatch(name) or os.path.exists(name) or os.path.isdir(name.split("/")[0])


def _compressed(contents: Iterable[bytes]) -> int:
    return sum(len(zlib.compress(content, 9)) + 150 for content in contents)
