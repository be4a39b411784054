"""Whether the Ray that a job is given can be joined, in one line and in seconds: Ray itself tries for minutes."""

from __future__ import annotations

import contextlib
import os
import re
import socket

from rlhf_ray.errors import ConfigError, ResourceError, RlhfRayError

ANSWER_S = 5.0
_PLACE = re.compile(r"\[?([^\[\]/]+?)\]?:(\d{1,5})")


def check_is_there(given: tuple[str, str]) -> None:
    """given: who says so, and the address, as `preflight.given_address` has them.

    Raises ConfigError for an address of another kind, ResourceError where no control service of Ray's answers."""
    who, address = given
    if address.startswith(("http://", "https://")):
        fix = f"HEAD:6379, or send the job there: rlhf-ray submit JOB --address {address}"
        raise ConfigError.at(who, "is the address of a dashboard", "that of Ray's control service", address, fix)
    if (place := _PLACE.fullmatch(address)) is None:
        return  # auto, local or ray://: Ray's own business
    host, port = place[1], int(place[2])
    own = f"start it; or, to let the job start its own Ray, {f'unset {who}' if who == 'RAY_ADDRESS' else 'run `ray stop`'}"
    try:
        socket.create_connection((host, port), timeout=ANSWER_S).close()
    except OSError as error:
        why = error.strerror or str(error)
        raise ResourceError.at(who, f"no Ray answers at {address}: {why}", "a running cluster", fix=own) from error
    if not _speaks_grpc(f"{host}:{port}"):
        what, expected = f"what answers at {address} is not Ray's control service", "its port, by default 6379"
        raise ResourceError.at(who, what, expected, fix=own)


def _speaks_grpc(target: str) -> bool:
    """True, too, where it cannot be told."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("0", "false", "False", ""):
        return True
    with contextlib.suppress(ImportError):
        import grpc

        with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
            try:
                grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
            except grpc.FutureTimeoutError:
                return False
    return True


def cannot_join(error: BaseException) -> RlhfRayError | None:
    """One line of what kept this process from joining or starting a Ray; None if it is nothing that is known."""
    text = str(error)
    if "timed out during startup" in text:
        fix = "wait for other work on this machine to end, or give the address of a running Ray (RAY_ADDRESS)"
        return ResourceError.at("ray", "did not start in time: this machine is too busy", fix=fix)
    versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", text)
    if "Version mismatch" in text and len(versions) == 2:
        theirs, ours = (f"Ray {ray}, Python {python}" for ray, python in versions)
        fix = "run this command in the cluster's environment, or start the cluster from this one"
        return ConfigError.at("ray", "the cluster runs other versions than this process", theirs, ours, fix)
    return None
