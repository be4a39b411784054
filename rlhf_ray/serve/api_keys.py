"""API keys: a file of their hashes. A key itself is shown once, when it is made, and stored nowhere."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.config.serve import ADAPTER_NAME
from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.serve.api_errors import ApiError
from rlhf_ray.storage.files import atomic_write_json, read_json

log = logging.getLogger(__name__)

SCHEMA = 1
KEY_PREFIX = "rr-"
REFRESH_S = 1.0
"""The file is checked for changes at most this often: a key that is revoked stops working within it."""


@dataclass(frozen=True)
class ApiKey:
    """name: for the access log.  models: names that it may use, empty for all.  max_concurrent: replies at a time, those of all its
    requests together.  max_tokens_per_minute: of prompts and replies."""

    name: str
    sha256: str
    models: tuple[str, ...] = ()
    max_concurrent: int | None = None
    max_tokens_per_minute: int | None = None

    def allows(self, model: str) -> bool:
        return not self.models or model.partition("@")[0] in self.models


class ApiKeys:
    """The keys in a file, as it is now. Raises ConfigError if the file is not there or others may read it.

    A service that is running lets nobody in while that is so (503), and tells its log."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file_version: tuple[int, ...] | None = None
        self._keys: tuple[ApiKey, ...] = ()
        self._refreshed_at = 0.0
        self._closed = False
        self._refresh()

    def authenticate(self, authorization: str | None) -> ApiKey:
        """The key of an `Authorization: Bearer ...` header. ApiError 401, the same for every key that is not good; 503 while the
        file cannot be trusted."""
        if time.monotonic() - self._refreshed_at > REFRESH_S:
            self._refresh_or_close()
        if self._closed:
            raise ApiError(503, "The service cannot check API keys now.", "keys_unavailable")
        scheme, _, key_text = (authorization or "").partition(" ")
        digest = hash_key(key_text.strip()) if scheme.lower() == "bearer" else ""
        match = None
        for key in self._keys:  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(key.sha256, digest):
                match = key
        if match is None:
            what = "Incorrect API key provided." if key_text else "No API key was given (Authorization: Bearer KEY)."
            raise ApiError(401, what, "invalid_api_key")
        return match

    def _refresh_or_close(self) -> None:
        try:
            self._refresh()
        except Exception as error:  # whatever is wrong with it: keys that were good may have been revoked since
            if not self._closed:
                log.error("no API key is accepted until the file of keys is in order: %s", error)
            self._closed, self._file_version = True, None
        else:
            if self._closed:
                log.warning("the file of API keys is in order again")
            self._closed = False

    def _refresh(self) -> None:
        self._refreshed_at = time.monotonic()
        try:
            status = self.path.stat()
        except OSError:
            raise ConfigError.at(
                "api_keys", f"no such file: {self.path}", fix="rlhf-ray api-key FILE --name NAME"
            ) from None
        version = status.st_mtime_ns, status.st_ctime_ns, status.st_ino  # ctime: also where only its mode has changed
        if self._file_version != version:
            self._keys = read_keys(self.path)
            self._file_version = version


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Raises ConfigError if others may read or write the file, ArtifactError if it is damaged."""
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigError.at("api_keys", f"{path} can be read by others", "mode 600", fix=f"chmod 600 {path}")
    found = read_json(path)
    try:
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']}")
        return tuple(
            ApiKey(
                str(k["name"]),
                _sha256(k["sha256"]),
                tuple(map(str, k["models"])),
                k["max_concurrent"],
                k.get("max_tokens_per_minute"),
            )
            for k in found["keys"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError.at(str(path), f"is no file of API keys: {type(error).__name__} {error}") from None


def _sha256(value: Any) -> str:
    if not isinstance(value, str) or len(value) != 64:
        raise ValueError("sha256")
    return value


def add_key(
    path: Path | str,
    name: str,
    models: tuple[str, ...] = (),
    max_concurrent: int | None = None,
    max_tokens_per_minute: int | None = None,
) -> str:
    """Make a key, store its hash in the file (made if it is not there), and return the key: it cannot be recovered."""
    path = Path(path)
    if not ADAPTER_NAME.fullmatch(name):
        raise ConfigError.at("--name", "is no name for a key", "1 to 64 letters, digits, _ . or -", repr(name[:80]))
    keys = read_keys(path) if path.exists() else ()
    if any(key.name == name for key in keys):
        raise ConfigError.at("--name", f"{path} has a key of this name", "another name, or revoke it first", name)
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    _write(path, (*keys, ApiKey(name, hash_key(key), models, max_concurrent, max_tokens_per_minute)))
    return key


def revoke_key(path: Path | str, name: str) -> None:
    """Remove a key; the service notices within REFRESH_S."""
    path = Path(path)
    keys = read_keys(path) if path.exists() else ()
    if not any(key.name == name for key in keys):
        raise ConfigError.at(
            "--name", f"{path} has no key of this name", ", ".join(k.name for k in keys) or "none", name
        )
    _write(path, tuple(key for key in keys if key.name != name))


def _write(path: Path, keys: tuple[ApiKey, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    before = os.umask(0o077)
    try:
        atomic_write_json(path, {"schema": SCHEMA, "keys": [k.__dict__ | {"models": list(k.models)} for k in keys]})
    finally:
        os.umask(before)
    path.chmod(0o600)
