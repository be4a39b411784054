"""What the nodes of a cluster say of themselves. Runs there, as a job of its own, with nothing of this package: standard library
and Ray alone. One JSON line on stdout.

python rlhf_ray_probe.py QUESTIONS        a JSON object: read (paths), write (a folder), modules (names to import), packages (names)
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

MARK = "rlhf-ray-probe:"
TIMEOUT_S = 120.0


def above(path: str) -> str:
    """The innermost folder at or above `path` that is there."""
    while not os.path.isdir(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def package_sha256() -> str | None:
    """Of the rlhf_ray that is installed, None where there is none. Nothing of it runs."""
    with contextlib.suppress(Exception):
        spec = importlib.util.find_spec("rlhf_ray")
        if spec is not None and spec.origin:
            return folder_sha256(os.path.dirname(spec.origin))
    return None


def folder_sha256(folder: str) -> str:
    digest = hashlib.sha256()
    found: list[str] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found += [os.path.join(root, name) for name in names if name.endswith(".py")]
    for path in sorted(found):
        digest.update(os.path.relpath(path, folder).encode() + b"\0")
        with open(path, "rb") as file:
            digest.update(hashlib.sha256(file.read()).digest())
    return digest.hexdigest()


def versions(names: Iterable[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def gpus() -> list[dict[str, Any]]:
    """Name, memory in bytes and driver of each GPU, by nvidia-smi: importing torch would take seconds."""
    query = "--query-gpu=name,memory.total,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(",") for line in done.stdout.splitlines() if line.count(",") == 2]
    return [{"name": n.strip(), "bytes": int(float(m)) * 2**20, "driver": d.strip()} for n, m, d in rows]


def memory() -> tuple[int | None, int | None]:
    """Bytes in all and free: of the container, where its limit is smaller than the machine."""
    sizes = {}
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        for line in file:
            name, _, rest = line.partition(":")
            sizes[name] = int(rest.split()[0]) * 1024
    with contextlib.suppress(Exception):
        from ray._common.utils import get_system_memory
        from ray._private.utils import estimate_available_memory  # /proc/meminfo knows nothing of cgroups, Ray does

        total, free = get_system_memory(), estimate_available_memory()
        return min(sizes.get("MemTotal", total), total), min(sizes.get("MemAvailable", free), free)
    return sizes.get("MemTotal"), sizes.get("MemAvailable")


def listening() -> list[tuple[str, int]]:
    """[[address, port]] of the TCP sockets that listen on more than the loopback address. Linux only."""
    found = set()
    for name, width in (("/proc/net/tcp", 8), ("/proc/net/tcp6", 32)):
        with contextlib.suppress(OSError), open(name) as file:
            for line in list(file)[1:]:
                parts = line.split()
                address, port = parts[1].split(":")
                if parts[3] != "0A":
                    continue
                loopback = address.endswith("7F") if width == 8 else address == "0" * 24 + "01000000"
                mapped = width == 32 and address.startswith("0" * 16 + "FFFF0000") and address.endswith("7F")
                if not loopback and not mapped:
                    found.add(("all" if set(address) == {"0"} else "one", int(port, 16)))
    return sorted(found)


def readable(path: str) -> str:
    """Empty if `path`, or the file that it names on an object store, can be read, else why not."""
    if "://" in path:
        return _on_a_store(path)
    try:
        if os.path.isdir(path):
            os.listdir(path)
        else:
            with open(path, "rb") as file:
                file.read(1)
    except OSError as error:
        return error.strerror or type(error).__name__
    return ""


def _on_a_store(uri: str) -> str:
    try:
        from pyarrow import fs

        store, path = fs.FileSystem.from_uri(uri)
        with store.open_input_stream(path) as file:
            file.read(1)
    except Exception as error:  # of pyarrow, or of whatever store
        return " ".join(str(error).split())[:200]
    return ""


def importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def look(questions: dict[str, Any], marker: str | None) -> dict[str, Any]:
    """What one node says. marker: a file that another node has made in the folder that is to be written."""
    folder = above(questions["write"]) if questions.get("write") else None
    writable = None
    if folder is not None:
        try:
            own = os.path.join(folder, f".rlhf-ray-probe-{os.getpid()}-{socket.gethostname()}")
            os.close(os.open(own, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            os.unlink(own)
            writable = ""
        except OSError as error:
            writable = error.strerror or type(error).__name__
    shared = None
    if marker is not None:
        deadline = time.monotonic() + 5  # NFS shows a new file late
        while not os.path.exists(marker) and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                os.listdir(os.path.dirname(marker))
            time.sleep(0.2)
        shared = os.path.exists(marker)
    total, free = memory()
    return {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "user": os.getuid(),
        "versions": versions(questions.get("packages", ())),
        "package": package_sha256(),
        "gpus": gpus(),
        "memory": total,
        "memory_free": free,
        "shm_free": shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None,
        "disk_free": shutil.disk_usage(folder or os.getcwd()).free,
        "folder": folder,
        "writable": writable,
        "shared": shared,
        "read": {path: readable(path) for path in questions.get("read", ())},
        "modules": {name: importable(name) for name in questions.get("modules", ())},
        "listening": listening(),
    }


def main(questions: dict[str, Any]) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    context = ray.get_runtime_context()
    own = context.get_node_id()
    marker = None
    if questions.get("write"):
        marker = os.path.join(above(questions["write"]), f".rlhf-ray-marker-{os.getpid()}-{socket.gethostname()}")
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except OSError:
            marker = None
    nodes = [node for node in ray.nodes() if node["Alive"]]
    ask = ray.remote(num_cpus=0, max_retries=1)(look)
    asked = {
        node["NodeID"]: ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(questions, marker)
        for node in nodes
    }
    try:
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=TIMEOUT_S)
        found = []
        for node in nodes:
            said = {
                "address": node["NodeManagerAddress"],
                "id": node["NodeID"],
                "resources": node["Resources"],
                "labels": node.get("Labels") or {},
                "is_driver": node["NodeID"] == own,
                "ray": ray.__version__,
                "gcs": context.gcs_address,
            }
            try:
                answer: Any = ray.get(asked[node["NodeID"]], timeout=0.1)
                said |= answer
            except Exception as error:
                said["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            found.append(said)
    finally:
        if marker is not None:
            with contextlib.suppress(OSError):
                os.unlink(marker)
    print(MARK + json.dumps({"nodes": found}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
