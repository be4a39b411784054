"""Addresses of files and folders on an object store, as against paths and Hub ids: `s3://bucket/rows.jsonl`."""

from __future__ import annotations

import re
import urllib.parse
from typing import TypeVar

Names = TypeVar("Names", str, tuple[str, ...])
CONTAINER_AT_ACCOUNT = ("abfs", "abfss")
"""Schemes in which what stands before the @ is a place (Azure)."""


def is_uri(name: str) -> bool:
    """Whether `name` names a file on a store.

    >>> [is_uri(name) for name in ("s3://bucket/a.jsonl", "data/a.jsonl", "tatsu-lab/alpaca")]
    [True, False, False]
    """
    return "://" in name


def has_credentials(uri: str) -> bool:
    """`s3://KEY:SECRET@bucket/...`, which would put a secret into job files, logs and manifests.

    >>> [has_credentials(uri) for uri in ("s3://key:secret@bucket/a.jsonl", "s3://bucket/a@b.jsonl?scheme=http")]
    [True, False]
    >>> [has_credentials(uri) for uri in ("abfs://container@account.dfs.core.windows.net/a", "abfs://box:key@account/a")]
    [False, True]
    """
    parts = urllib.parse.urlsplit(uri)
    user = parts.password if parts.scheme in CONTAINER_AT_ACCOUNT else parts.netloc.rpartition("@")[0]
    return bool(user) or "secret_key" in parts.query.lower()


def hidden(text: str) -> str:
    """`text` to be shown, with what stands before the @ of a URI's place taken out.

    >>> hidden("copy_to=s3://key:secret@bucket/x")
    'copy_to=s3://***@bucket/x'
    """
    return re.sub(r"://[^/@\s]*@", "://***@", text)


def without_credentials(names: Names) -> Names:
    """`names` as they are. ValueError, which does not show them, if any is a URI with credentials in it."""
    if any(is_uri(name) and has_credentials(name) for name in ([names] if isinstance(names, str) else names)):
        raise ValueError("a URI has credentials in it; they belong into the environment of each machine that uses it")
    return names


def a_folder_here(path: str) -> str:
    """`path` as it is. ValueError if it is a URI."""
    if is_uri(path):
        raise ValueError("is a URI; expected a folder (copy_to copies a run to an object store)")
    return path
