"""Where rows are: a file, here or on an object store, or a Hub data set. A path is looked at before it is opened: none can hang."""

from __future__ import annotations

import contextlib
import difflib
import gzip
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Literal, cast

from rlhf_ray.config.uris import is_uri
from rlhf_ray.data.remote import fetch, path_of
from rlhf_ray.errors import DataError

Kind = Literal["jsonl", "json", "csv", "parquet", "hub"]

SUFFIXES: dict[str, Kind] = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
LABELS: dict[Kind, str] = {"jsonl": "JSONL", "json": "JSON", "csv": "CSV", "parquet": "Parquet", "hub": "Hub"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> words in the names of its files and folders, as on the Hub."""
_HUB_FILES = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json")
_HUB_HEADER = re.compile(rb"\A---\r?\n(?:.*\n)*?(?:configs|dataset_info):")
_MAGIC = ((b"\x1f\x8b", "gzip"), (b"PAR1", "Parquet"), (b"PK\x03\x04", "zip"), (b"\x28\xb5\x2f\xfd", "zstd"))


@dataclass(frozen=True)
class DataSource:
    """A readable data file, or a Hub id. `name` is what the user wrote; errors and `Row.where` start with it. copy: where a file
    of an object store lies here."""

    name: str
    kind: Kind
    compressed: bool = False
    copy: str = ""

    @property
    def path(self) -> str:
        return self.copy or os.path.expanduser(self.name)

    def open(self) -> BinaryIO:
        """The file's bytes, decompressed. The caller closes it."""
        if not self.compressed:
            return self.open_raw()
        return cast(BinaryIO, gzip.open(self.path, "rb"))

    def open_raw(self) -> BufferedReader:
        """The file's bytes as they lie on disk."""
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise DataError.at(self.name, f"cannot be read: {error.strerror}") from error

    def state(self) -> tuple[int, int, int] | None:
        """What differs once the file is written again; None of a Hub data set, whose copy here never is, and of a lost file."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def sha256(self) -> str:
        """Hash of the file as it lies on disk."""
        with self.open_raw() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def find(name: str) -> DataSource:
    """The source that `name` means: a URI, an existing file, a folder with data files (kind "hub", see `files_of`), else a Hub id.

    Raises DataError: no such file (with the nearest name there is), not a regular file, an unknown type, or content that
    contradicts the name.
    """
    if is_uri(name):
        return _on_a_store(name)
    kind, compressed = _kind_of(name)
    path = Path(os.path.expanduser(name))
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if kind is None and _may_be_hub_id(name, path):
            return DataSource(name, "hub")
        raise DataError.at(name, "no such file", fix=nearest(name)) from None
    except PermissionError as error:
        raise DataError.at(name, f"cannot be read: {error.strerror}") from error
    except OSError as error:
        raise DataError.at(name, f"{_not_a(kind)}: {error.strerror}") from error
    except ValueError as error:  # a NUL character in the name
        raise DataError.at(repr(name), f"not a file name: {error}") from error
    if stat.S_ISDIR(mode) and kind is None and _has_data(path):
        return DataSource(name, "hub")
    if not stat.S_ISREG(mode):
        what = "it is a directory" if stat.S_ISDIR(mode) else "it is not a regular file"
        raise DataError.at(name, f"{_not_a(kind)}: {what}")
    if kind is None:
        raise _unknown_type(name)
    source = DataSource(name, kind, compressed)
    _check_content(source)
    return source


def _on_a_store(uri: str) -> DataSource:
    kind, compressed = _kind_of(path_of(uri))
    if kind is None:
        raise _unknown_type(uri)
    source = DataSource(uri, kind, compressed, str(fetch(uri)))
    _check_content(source)
    return source


def _unknown_type(name: str) -> DataError:
    return DataError.at(name, "unknown file type", expected=f"{' '.join(SUFFIXES)}, each also with .gz")


def _kind_of(name: str) -> tuple[Kind | None, bool]:
    lower = name.lower()
    return SUFFIXES.get(os.path.splitext(lower.removesuffix(".gz"))[1]), lower.endswith(".gz")


def _may_be_hub_id(name: str, path: Path) -> bool:
    in_a_folder = "/" in name and path.parent.is_dir()
    return _HUB_ID.fullmatch(name) is not None and not in_a_folder and not path.is_symlink()


def _has_data(folder: Path) -> bool:
    """A data set as the Hub has it, that lies here: data files in it, or one level below."""
    files = (*folder.glob("*"), *folder.glob("*/*"))
    return any(_kind_of(file.name)[0] is not None and file.is_file() for file in files)


def files_of(source: DataSource, split: str, config: str | None = None) -> tuple[list[DataSource], list[str]]:
    """The files of one split of a folder that lies here, in the order of their names, and the names of its other data files; of any
    other source itself.

    A file belongs to the split that its name, or the folder it is in, names with a word of SPLITS, and to `train` if it names none.
    Folders that are laid out like a Hub data set (a README.md that tells its `configs`, data/train-*), those that its library has
    saved, and what only that library understands (config, other splits, slices), are one source, which it reads.
    Raises DataError: no file of the split, one and the same name with two suffixes, or as `find`."""
    folder = Path(source.path)
    if source.kind != "hub" or not folder.is_dir() or config is not None or split not in SPLITS or _is_hub_set(folder):
        return [source], []
    of_split: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_data = _kind_of(path.name)[0] is not None and path.is_file()
        if is_data and not any(part.startswith((".", "__")) for part in name.parts):
            of_split.setdefault(_split_of(name), []).append(name)
    names = of_split.get(split, [])
    if not names:
        raise DataError.at(
            source.name, f"no file of split '{split}'", got=", ".join(of_split), fix="data.split: one of them"
        )
    stems: dict[str, Path] = {}
    for name in names:
        first = stems.setdefault(str(name).lower().removesuffix(".gz").rpartition(".")[0], name)
        if first != name:
            fix = "name the files one by one, each set of rows once"
            raise DataError.at(source.name, f"{first} and {name} may hold the same rows", fix=fix)
    at = source.name.rstrip("/")
    others = [f"{at}/{name.as_posix()}" for other, found in of_split.items() if other != split for name in found]
    return [find(f"{at}/{name.as_posix()}") for name in names], others


def _is_hub_set(folder: Path) -> bool:
    """Whether a folder says itself what its splits are."""
    card = folder / "README.md"
    with contextlib.suppress(OSError):
        if card.is_file() and _HUB_HEADER.match(card.read_bytes().partition(b"\n---")[0] + b"\n"):
            return True
    shards = (shard for words in SPLITS.values() for word in words for shard in folder.glob(f"data/{word}-*"))
    return any((folder / name).is_file() for name in _HUB_FILES) or any(shards)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the `datasets` library wrote a folder: a DatasetDict, or one Dataset."""
    of_one = ("state.json", "dataset_info.json")
    return (folder / "dataset_dict.json").is_file() or all((folder / name).is_file() for name in of_one)


def _split_of(name: Path) -> str:
    """The split that the file's own name tells, else the folders it is in, else `train`."""
    for part in reversed(name.parts):
        words = re.split(r"[^a-z0-9]+|(?<=[a-z])(?=[0-9])", part.lower())
        for split, known in SPLITS.items():
            if not set(known).isdisjoint(words):
                return split
    return "train"


def _not_a(kind: Kind | None) -> str:
    return f"not a {LABELS[kind]} file" if kind else "not a data file"


def nearest(name: str) -> str:
    """A hint for a missing file: the most similar name in its folder, or where relative paths start."""
    path = Path(os.path.expanduser(name))
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return f"there is no folder {path.parent}; relative paths start at {Path.cwd()}"
    match = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"did you mean '{path.parent / match[0]}'?" if match else f"relative paths start at {Path.cwd()}"


def _check_content(source: DataSource) -> None:
    """The first bytes must not contradict the name."""
    with source.open_raw() as raw:
        head = raw.read(16)
    if not head:
        raise DataError.at(source.name, "file is empty")
    found = next((label for magic, label in _MAGIC if head.startswith(magic)), "")
    not_a = _not_a(source.kind)
    if source.compressed:
        if found != "gzip":
            raise DataError.at(source.name, f"{not_a}: its name ends in .gz, its content is not gzip data")
    elif found != "Parquet" and source.kind == "parquet":
        raise DataError.at(source.name, f"{not_a}: its content is {found or 'other'} data")
    elif found and source.kind != "parquet":
        fix = f"name it {source.name}.gz" if found == "gzip" else ""
        raise DataError.at(source.name, f"{not_a}: its content is {found} data", fix=fix)
