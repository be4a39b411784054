"""A cluster's job API: who may ask, whether it asks for a token at all, and Ray's own client behind errors in one line.

The token goes into the header of each request and nowhere else: not into argv, the entrypoint, the runtime environment or metadata.
"""

from __future__ import annotations

import http.client
import ipaddress
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rlhf_ray.errors import ConfigError, ResourceError

LOOK_S = 15.0
"""The longest that a cluster may take to answer."""
START_S = 60.0
"""A cluster that has just been started takes so long before it takes jobs."""
TOKEN_FILE = "~/.ray/auth_token"
MOST_TOKEN_BYTES = 10_000
TUNNEL = "is the cluster up? its port 8265 is reached through a tunnel: ssh -L 8265:127.0.0.1:8265 HEAD"
T = TypeVar("T")


@dataclass(frozen=True)
class AuthToken:
    """where: the variable or file it came from, for errors."""

    value: str = field(repr=False)
    where: str


def find_token(environment: Mapping[str, str] = os.environ) -> AuthToken | None:
    """The token that Ray itself would use: RAY_AUTH_TOKEN, else the file RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token.

    ConfigError if RAY_AUTH_TOKEN_PATH cannot be read."""
    if value := environment.get("RAY_AUTH_TOKEN", "").strip():
        return _checked(AuthToken(value, "RAY_AUTH_TOKEN"))
    named = environment.get("RAY_AUTH_TOKEN_PATH", "")
    path = Path(named or TOKEN_FILE).expanduser()
    try:
        with open(path, "rb") as file:
            value = file.read(MOST_TOKEN_BYTES).decode("ascii", "replace").strip()
    except OSError as error:
        if not named:
            return None
        raise ConfigError.at(
            "RAY_AUTH_TOKEN_PATH", f"cannot be read: {error.strerror}", "a file with the cluster's token", named
        ) from None
    return _checked(AuthToken(value, named or TOKEN_FILE)) if value else None


def _checked(token: AuthToken) -> AuthToken:
    if not (token.value.isascii() and token.value.isprintable() and " " not in token.value):
        raise ConfigError.at(token.where, "contains no token", "one line of letters and digits")
    return token


def check_address(address: str | None) -> str:
    """`http://HEAD:8265`, without a trailing slash. ConfigError for anything else."""
    if not address:
        raise ConfigError.at("--address", "is missing", "http://HEAD:8265", fix="name the cluster's dashboard")
    parts = urllib.parse.urlsplit(address)
    try:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        fix = "jobs go through the dashboard's port, 8265" if parts.scheme == "ray" or ":6379" in address else ""
        raise ConfigError.at("--address", "is not the address of a dashboard", "http://HEAD:8265", address, fix)
    if parts.username or parts.password:
        raise ConfigError.at("--address", "holds a user name or password", "http://HEAD:8265", fix="leave them out")
    return address.rstrip("/")


@dataclass(frozen=True)
class HttpAnswer:
    """What the cluster answers to GET /api/jobs/.   status: of HTTP, 0 if there is no answer.   text: its start, or the reason."""

    status: int
    text: str = ""


def look(address: str, token: AuthToken | None = None, timeout_s: float = LOOK_S) -> HttpAnswer:
    """Ask once, with `token` or bare. Follows no redirects: a token must not travel on."""
    _ask_this_machine_itself(address)
    request = urllib.request.Request(f"{address}/api/jobs/")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token.value}")
    opener = urllib.request.build_opener(_Stay)
    try:
        with opener.open(request, timeout=timeout_s) as found:
            return HttpAnswer(found.status, found.read(200).decode("utf-8", "replace"))
    except urllib.error.HTTPError as error:
        return HttpAnswer(error.code, error.read(200).decode("utf-8", "replace"))
    except http.client.HTTPException:  # a port of Ray's own protocol, say
        return HttpAnswer(0, "what listens there does not speak HTTP")
    except (urllib.error.URLError, OSError, ValueError) as error:
        return HttpAnswer(0, " ".join(str(getattr(error, "reason", error)).split()))


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:  # type: ignore[override]
        return None


def connect(address: str | None, warn: Callable[[str], None]) -> Cluster:
    """The cluster at `address`, whose answer and token are checked first.

    Raises ConfigError for a missing or wrong token, ResourceError for a cluster that does not answer."""
    url = check_address(address)
    bare, token = look(url), None
    if bare.status == 0:
        proxy = _proxy_hint(url)
        fix = f"it is asked through a proxy; {proxy} goes around it; or {TUNNEL}" if proxy else TUNNEL
        raise ResourceError.at(url, f"cannot be reached: {bare.text}", fix=fix)
    if bare.status == 200:
        warn(
            f"{url} does not require a token: anyone who can reach it can run code there (set RAY_AUTH_MODE=token on every node)"
        )
    elif bare.status in (401, 403):
        token = _accepted(url)
    else:
        raise _no_dashboard(url, bare)
    return Cluster(url, token)


def _proxy_hint(url: str) -> str:
    """How to go around the proxy that requests to `url` go through; "" where they go through none."""
    parts = urllib.parse.urlsplit(url)
    is_used = parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.netloc)
    return f"NO_PROXY={parts.hostname}" if is_used else ""


def _ask_this_machine_itself(url: str) -> None:
    """What listens on this machine, a tunnel to the cluster say, is not asked through a proxy, neither by us nor by Ray's client:
    the proxy would look for it on its own machine, and read the token."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        is_here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = False
    if is_here:
        for name in ("no_proxy", "NO_PROXY"):
            known = [part for part in os.environ.get(name, "").split(",") if part.strip()]
            os.environ[name] = ",".join(dict.fromkeys([*known, host]))


def _no_dashboard(url: str, answer: HttpAnswer) -> ResourceError:
    fix = "name the port of the head's dashboard, 8265 unless it was given another one"
    fix += f"; or a proxy answers in its place: {proxy}" if (proxy := _proxy_hint(url)) else ""
    return ResourceError.at(url, "does not answer as Ray does", "a Ray dashboard", f"HTTP status {answer.status}", fix)


def _accepted(url: str) -> AuthToken:
    token = find_token()
    if token is None:
        fix = f"copy {TOKEN_FILE} of the head node here (chmod 600), or name a file in RAY_AUTH_TOKEN_PATH"
        raise ConfigError.at(url, "requires a token, and none was found here", fix=fix)
    answer = look(url, token)
    if answer.status in (401, 403):
        fix = (
            "take the token of the cluster's head node: RAY_AUTH_TOKEN_PATH=FILE, or RAY_AUTH_TOKEN in the environment"
        )
        raise ConfigError.at(url, f"refuses the token of {token.where}", fix=fix)
    if answer.status == 0:
        raise ResourceError.at(url, f"cannot be reached: {answer.text}", fix=TUNNEL)
    if answer.status != 200:
        raise _no_dashboard(url, answer)
    return token


class Cluster:
    """Ray's JobSubmissionClient. ResourceError where the cluster goes away or refuses."""

    def __init__(self, url: str, token: AuthToken | None) -> None:
        os.environ["RAY_AUTH_MODE"] = (
            "disabled" if token is None else "token"
        )  # of this process's Ray, before it is imported
        from ray.job_submission import JobSubmissionClient

        for module in ("dashboard_sdk", "job.sdk"):  # what is sent, and how it ends, the command itself tells
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
        self.url, self.token = url, token
        headers = {} if token is None else {"Authorization": f"Bearer {token.value}"}
        self._client = self._asked(lambda: JobSubmissionClient(url, headers=headers))

    def _asked(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except (OSError, RuntimeError, ValueError) as error:
            line = next((part.strip() for part in reversed(str(error).splitlines()) if part.strip()), "no reason told")
            raise ResourceError.at(self.url, f"the job API failed: {line[:300]}") from error

    def submit(
        self, entrypoint: str, submission_id: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                self._asked(
                    lambda: self._client.submit_job(
                        entrypoint=entrypoint, submission_id=submission_id, runtime_env=runtime_env, metadata=metadata
                    )
                )
                return
            except ResourceError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(1.0)

    def details(self, submission_id: str) -> Any:
        """Ray's JobDetails: status, message, driver_exit_code, ..."""
        return self._asked(lambda: self._client.get_job_info(submission_id))

    def logs(self, submission_id: str) -> str:
        return self._asked(lambda: self._client.get_job_logs(submission_id))

    def stop(self, submission_id: str) -> None:
        self._asked(lambda: self._client.stop_job(submission_id))

    def delete(self, submission_id: str) -> None:
        """Forget a job that has ended."""
        self._asked(lambda: self._client.delete_job(submission_id))

    def jobs(self) -> list[Any]:
        return self._asked(self._client.list_jobs)

    def tail(self, submission_id: str) -> AsyncIterator[str]:
        """The log from its beginning as it grows, in pieces; ends with the job, or with the connection."""
        found: AsyncIterator[str] = self._client.tail_job_logs(submission_id)
        return found
