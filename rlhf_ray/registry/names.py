"""Names of adapters: `helper` (the live version), `helper@v3`, `helper@v3-1a2b3c4d`. Paths are made from checked parts only."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlhf_ray.errors import ConfigError

_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
_ALIAS = re.compile(_NAME)
_SPEC = re.compile(rf"(?P<name>{_NAME})(@v(?P<version>[1-9][0-9]{{0,8}})(-(?P<hash8>[0-9a-f]{{8}}))?)?")
_VERSION = re.compile(r"v?([1-9][0-9]{0,8})")
RESERVED = ("base",)
"""`base` is the model without an adapter, wherever a policy is named."""
EXPECTED = "1 to 64 letters, digits, _ . or -, the first a letter or digit"


@dataclass(frozen=True)
class Spec:
    """What a request names. version: None for the live one.  hash8: None where it does not matter."""

    name: str
    version: int | None = None
    hash8: str | None = None


def is_alias(name: str) -> bool:
    return _ALIAS.fullmatch(name) is not None and name.casefold() not in RESERVED


def check_alias(name: str, where: str = "--alias") -> str:
    """`name`, if an adapter may have it. ConfigError otherwise."""
    if name.casefold() in RESERVED:
        raise ConfigError.at(where, f"{name!r} is reserved for the model without an adapter", "another name")
    if not _ALIAS.fullmatch(name):
        raise ConfigError.at(where, "is not a name for an adapter", EXPECTED, repr(name[:80]))
    return name


def read_spec(text: str) -> Spec:
    """ConfigError for anything but NAME, NAME@vN and NAME@vN-hash8."""
    found = _SPEC.fullmatch(text)
    if found is None or not is_alias(found["name"]):
        raise ConfigError.at(
            "adapter", "is not a name of an adapter", "NAME, NAME@v3 or NAME@v3-1a2b3c4d", repr(text[:80])
        )
    return Spec(found["name"], int(found["version"]) if found["version"] else None, found["hash8"])


def read_version(text: str | int, where: str = "--to") -> int:
    """3 of `v3` or `3`. ConfigError for anything else."""
    found = _VERSION.fullmatch(str(text))
    if found is None:
        raise ConfigError.at(where, "is not a version", "v1, v2, ...", repr(str(text)[:80]))
    return int(found[1])


def adapter_id(name: str, version: int, sha256: str) -> str:
    """Name of the folder of a version, and of the version in every log: `helper@v3-1a2b3c4d`."""
    return f"{name}@v{version}-{sha256[:8]}"
