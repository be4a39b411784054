"""What must not leave this machine with a job: the values of secret environment variables, keys by their form, files of secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath

from rlhf_ray.config.endpoints import secrets_in
from rlhf_ray.errors import ConfigError, Problem

_VARIABLE = re.compile(r"(?i).*(token|secret|password|passwd|credential|api_?key|access_?key|private_?key)s?(_.*)?$")
_PATH_VARIABLE = re.compile(r"(?i).*(_path|_file|_dir|_home)$")
_FILES = re.compile(
    r"(?i)(\.env(\..*)?|.*\.(pem|key|p12|pfx|keytab)|id_(rsa|dsa|ecdsa|ed25519)|auth_token|\.netrc|credentials(\.json)?)"
)
SHORTEST = 8
"""A shorter value is no secret, and would be found everywhere."""


def secret_values(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variable -> value of those that hold secrets, by their names."""
    return {
        name: value
        for name, value in environment.items()
        if _VARIABLE.fullmatch(name) and not _PATH_VARIABLE.fullmatch(name) and len(value) >= SHORTEST
    }


def problems(where: str, content: bytes, environment: Mapping[str, str] = os.environ) -> Iterator[Problem]:
    """One problem for each secret in a file that would be sent. The secret itself is not told.

    where: the file's path."""
    fix = "secrets live on the nodes; take it out of the file"
    if _FILES.fullmatch(PurePath(where).name):
        yield Problem(where, "is a file of secrets by its name, and is not sent", fix=fix)
    for name, value in secret_values(environment).items():
        if value.encode() in content:
            yield Problem(where, f"holds the value of {name}, and is not sent", fix=fix)
    text = content.decode("utf-8", "ignore")
    for kind in secrets_in(text):
        yield Problem(where, f"holds {kind}, and is not sent", fix=fix)


def check(where: str, content: bytes) -> None:
    """ConfigError if a file that would be sent holds a secret."""
    ConfigError.raise_all(problems(where, content))
