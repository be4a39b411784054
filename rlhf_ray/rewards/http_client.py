"""Requests to a server that scores, judges or answers: JSON in, JSON out, with retries, and with nothing that gives a key away.

TLS certificates are verified (SSL_CERT_FILE adds an authority), proxies come from the environment except for this machine itself,
cookies are not kept, and no redirect leads to another host: credentials would go with it.
"""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import ipaddress
import json
import os
import random
import socket
import stat
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp

from rlhf_ray.config.endpoints import LONGEST_RETRY_AFTER_S, longest_request_s
from rlhf_ray.errors import ConfigError, Interrupted, ResourceError
from rlhf_ray.runtime import coroutines
from rlhf_ray.runtime.watchdog import asking

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 529})
"""Statuses after which the same request may succeed."""
MAX_ANSWER_BYTES = 256 * 2**20
MAX_REDIRECTS = 3
REACH_TIMEOUT_S = 10.0
SHOWN = 200
FIX = "start or repair the server"


class _Failed(Exception):
    """One try. again: whether another one may succeed.  after: seconds that the server asks to wait."""

    def __init__(self, what: str, again: bool = True, after: float | None = None) -> None:
        super().__init__(what)
        self.what, self.again, self.after = what, again, after


class HttpClient:
    """where: what it is for, in messages.  url: of every request.  headers: sent with each, never shown.

    timeout_s, max_retries, concurrency, requests_per_minute: as in config/endpoints.py.

    accept: turns the answer's JSON into a result; a ValueError of it is nonsense, after which the server is asked again.
    accept_error: (status, JSON) of an error that is a result all the same, which it returns; None for all others."""

    def __init__(
        self,
        where: str,
        url: str,
        headers: Mapping[str, str],
        *,
        timeout_s: float,
        max_retries: int,
        concurrency: int,
        requests_per_minute: float | None = None,
        accept: Callable[[Any], Any] = lambda answer: answer,
        accept_error: Callable[[int, Any], Any] = lambda status, answer: None,
    ) -> None:
        self.where, self.url, self.accept, self.accept_error = where, url, accept, accept_error
        self._headers = {"Content-Type": "application/json", **headers}
        self._secrets = [s for value in headers.values() for s in (value, value.rpartition(" ")[2]) if len(s) > 3]
        self.timeout_s, self.max_retries, self.concurrency = timeout_s, max_retries, concurrency
        self._spacing = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next_at = 0.0
        self._longest_s = longest_request_s(timeout_s, max_retries, concurrency, requests_per_minute)
        self.retries = 0

    def ask_all(
        self,
        bodies: Sequence[Any],
        before: Callable[[], None] = lambda: None,
        done: Callable[[int, Any], Any] | None = None,
    ) -> list[Any]:
        """The accepted answer to each of `bodies`, in order; `concurrency` of them at a time.

        before: called before each request, and may raise.  done: called with number and answer as soon as one is there; what it
        returns takes the answer's place. If one request fails for good, those under way are finished and handed to `done` first.

        Raises Interrupted, which names the last fault."""
        return coroutines.run(self._ask_all(bodies, before, done or (lambda number, answer: answer)))

    async def _ask_all(
        self, bodies: Sequence[Any], before: Callable[[], None], done: Callable[[int, Any], Any]
    ) -> list[Any]:
        found: list[Any] = [None] * len(bodies)
        numbers = iter(range(len(bodies)))
        errors: list[Exception] = []
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self.concurrency),  # of aiohttp's 100 the others' time would run out
            timeout=aiohttp.ClientTimeout(total=self.timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,  # it would also send a login of ~/.netrc
            headers={"User-Agent": "rlhf_ray"},
        ) as http:

            async def worker() -> None:
                for number in numbers:
                    if errors:
                        return
                    try:
                        before()
                        with asking(self._longest_s):
                            answer = await self._ask(http, bodies[number])
                        found[number] = done(number, answer)
                    except Exception as error:
                        errors.append(error)

            await asyncio.gather(*(worker() for _ in range(min(self.concurrency, len(bodies)))))
        if errors:
            raise errors[0]
        return found

    async def _wait_for_turn(self) -> None:
        if self._spacing:
            now = time.monotonic()
            turn = max(self._next_at, now)
            self._next_at = turn + self._spacing
            await asyncio.sleep(turn - now)

    async def _ask(self, http: aiohttp.ClientSession, body: Any) -> Any:
        data = json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        for tried in range(self.max_retries + 1):
            await self._wait_for_turn()
            try:
                return await self._try(http, data)
            except _Failed as failed:
                last = tried == self.max_retries
                if last or not failed.again or (failed.after or 0.0) > LONGEST_RETRY_AFTER_S:
                    times = f" ({tried + 1} tries)" if tried else ""
                    raise Interrupted.at(self.where, self._shown(failed.what) + times, fix=FIX) from None
                pause = min(FIRST_PAUSE_S * 2**tried, LONGEST_PAUSE_S) * random.Random().uniform(0.75, 1.25)
                self.retries += 1
                await asyncio.sleep(pause if failed.after is None else failed.after)
        raise AssertionError

    async def _try(self, http: aiohttp.ClientSession, data: bytes) -> Any:
        started = time.monotonic()
        url, proxy = self.url, _proxy(self.url)
        try:
            for _ in range(MAX_REDIRECTS + 1):
                left = aiohttp.ClientTimeout(total=max(self.timeout_s - (time.monotonic() - started), 0.001))
                async with http.post(
                    url, data=data, headers=self._headers, allow_redirects=False, timeout=left, proxy=proxy
                ) as response:
                    if not 300 <= response.status < 400:
                        return self._read(response, await _body(response))
                    url = self._redirected(url, response)
            raise _Failed(f"redirects more than {MAX_REDIRECTS} times", again=False)
        except TimeoutError:
            raise _Failed(f"no answer within timeout_s {self.timeout_s:g}") from None
        except aiohttp.ClientConnectorCertificateError as error:
            raise _Failed(f"its TLS certificate is not trusted: {error.certificate_error}", again=False) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Failed(f"cannot be reached: {_cause(error)}") from None

    def _redirected(self, url: str, response: aiohttp.ClientResponse) -> str:
        """Where a redirect leads, if that is on the same host and the request stays what it is."""
        target = urljoin(url, response.headers.get("Location", ""))
        if _origin(target) != _origin(url):
            host = urlsplit(target).hostname
            raise _Failed(f"redirects to another host, {host}; name that one in the job if you trust it", again=False)
        if response.status not in (307, 308):
            raise _Failed(f"answered with redirect {response.status}, which would lose the request", again=False)
        return target

    def _read(self, response: aiohttp.ClientResponse, body: bytes) -> Any:
        if response.status != 200:
            if (found := self.accept_error(response.status, _json_or_none(body))) is not None:
                return found
            says = body[:SHOWN].decode("utf-8", "replace")
            what = f"answered with status {response.status}" + (f": {says}" if says.strip() else "")
            raise _Failed(what, response.status in AGAIN, _retry_after(response.headers.get("Retry-After")))
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            raise _Failed(f"did not answer with JSON: {body[:SHOWN]!r}") from None
        try:
            return self.accept(answer)
        except ValueError as error:
            raise _Failed(str(error)) from None

    def _shown(self, text: str) -> str:
        """`text` without the values of headers: servers echo what they refuse."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def credentials(where: str, headers_file: str | None, api_key_env: str | None) -> dict[str, str]:
    """Headers to be sent: those of the file, and `Authorization: Bearer` from the environment of this process.

    Raises ConfigError, which never shows a value: a file that is not there, that others may read, or that is not `Name: value`
    lines; a variable that is not set."""
    headers: dict[str, str] = {}
    if headers_file is not None:
        headers = _read_headers(f"{where}.headers_file", Path(headers_file).expanduser())
    if api_key_env is not None:
        key = os.environ.get(api_key_env, "").strip()
        if not key:
            fix = f"export {api_key_env} on every node, before Ray starts there"
            raise ConfigError.at(f"{where}.api_key_env", f"{api_key_env} is not set on this node", fix=fix)
        if not key.isprintable() or not key.isascii():
            raise ConfigError.at(f"{where}.api_key_env", f"the value of {api_key_env} is no key", "one line of ASCII")
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _read_headers(where: str, path: Path) -> dict[str, str]:
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigError.at(where, f"{path} can be read by others", "mode 600", fix=f"chmod 600 {path}")
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise ConfigError.at(where, f"cannot be read on this node: {error.strerror}", got=str(path)) from None
    except UnicodeDecodeError:
        raise ConfigError.at(where, f"{path} is not ASCII") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        name, colon, value = line.partition(":")
        if not line.strip():
            continue
        if not colon or not name.replace("-", "").replace("_", "").isalnum() or not value.strip():
            raise ConfigError.at(f"{path}:{number}", "is no header", "Name: value")
        found[name] = value.strip()
    return found


async def _body(response: aiohttp.ClientResponse) -> bytes:
    parts, size = [], 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise _Failed(f"its answer is longer than {MAX_ANSWER_BYTES:,} bytes", again=False)
    return b"".join(parts)


def _json_or_none(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for `url`; None for this machine itself, and for hosts of no_proxy."""
    parts = urlsplit(url)
    if _is_this_machine(url) or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def _cause(error: BaseException) -> str:
    """What the operating system says, without aiohttp's objects in it."""
    os_error = getattr(error, "os_error", error)
    return getattr(os_error, "strerror", None) or str(error) or type(error).__name__


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or an HTTP date; None without either."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if when.tzinfo is None:  # of a date in zone -0000
        when = when.replace(tzinfo=datetime.UTC)
    return max((when - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0)


def check_reachable(where: str, url: str) -> None:
    """Before anything is loaded: does somebody listen there? Nothing is sent. Behind a proxy it is not known, and not asked.

    Raises ResourceError."""
    parts = urlsplit(url)
    if _proxy(url) is not None:
        return
    try:
        socket.create_connection((parts.hostname, _origin(url)[2]), REACH_TIMEOUT_S).close()
    except OSError as error:
        what = f"{_origin(url)[1]}:{_origin(url)[2]} cannot be reached from this node: {error.strerror or error}"
        raise ResourceError.at(where, what, fix="start the server, or correct the address") from None
