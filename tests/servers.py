"""A scripted HTTP server for tests: it knows the right answer, and misbehaves as it is told. Standard library, on loopback."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import SystemRandom
from typing import Any


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, for servers that are told theirs. From where neither the system (32768 up) nor Ray (10002 to
    19999) gives ports by chance: another process could get one of those between this look and the server's start."""
    found: set[int] = set()
    while len(found) < count:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", SystemRandom().randrange(20000, 32000)))
            found.add(int(probe.getsockname()[1]))
    return sorted(found)


@dataclass
class Reply:
    """status, headers, body (JSON, or bytes as they are).  wait_s: before it is sent."""

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    wait_s: float = 0.0


@dataclass
class ScriptedServer:
    """answer: request body -> JSON, or a Reply.  faults: replies that are given first, one to each request, in order.

    asked: bodies of all requests.  seen: their headers."""

    answer: Callable[[Any], Any]
    faults: list[Reply] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)
    seen: list[dict[str, str]] = field(default_factory=list)
    url: str = ""
    busy: int = 0
    most_busy: int = 0


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    """Clients that may wait to be let in; with the default, 5, others would try again seconds later."""


@contextmanager
def serving(answer: Callable[[Any], Any], *faults: Reply, path: str = "/score") -> Iterator[ScriptedServer]:
    """A server on a free port while the block lasts."""
    script, lock = ScriptedServer(answer, list(faults)), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                script.asked.append(body)
                script.seen.append(dict(self.headers))
                script.busy += 1
                script.most_busy = max(script.most_busy, script.busy)
                fault = script.faults.pop(0) if script.faults else None
            try:
                found = fault if fault is not None else script.answer(body)
                reply = found if isinstance(found, Reply) else Reply(found)
                time.sleep(reply.wait_s)
            finally:
                with lock:
                    script.busy -= 1
            raw = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(raw)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)
            except OSError:  # the client has left
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    script.url = f"http://127.0.0.1:{server.server_port}{path}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
