"""Ten times as many requests as the service can answer, for a minute: what is refused and how fast, how those fare who are let in.

    python benchmarks/serve_overload.py --output

The model and the requests of serve_load.py, against the base. Capacity is what is answered where as many clients as the service has
places (those being written and those waiting) ask again and again: the most of which none is refused. Then requests come at random
moments at ten times that rate, whatever comes back. The load generator runs on the same cores as the service, at a lower priority.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from _common import emit, parser, report
from serve_load import LIMIT, TOKENS, WAITING, Server, gather, load, make_model, ours, running


def overload(server: Server, clients: int, requests: int, seconds: float) -> dict[str, Any]:
    """Memory is read each second, and its growth is that from the tenth second to the last."""
    load(server, ["base"], "--clients", "4", "--requests", "8")
    one_batch = load(server, ["base"], "--clients", str(LIMIT), "--requests", str(requests))
    capacity = load(server, ["base"], "--clients", str(clients), "--requests", str(requests))
    memory, stopping = [server.memory_mib()], threading.Event()

    def watch() -> None:
        while not stopping.wait(1.0):
            memory.append(server.memory_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    rate = 10 * capacity["requests_per_second"]
    found = load(server, ["base"], "--rate", f"{rate:.2f}", "--seconds", str(seconds))
    stopping.set()
    watcher.join()
    single = load(server, ["base"], "--clients", "1", "--requests", "1")
    answers = found["answers"]
    return {
        "refused_at_capacity": requests - capacity["answers"].get("200", 0),
        "p99_of_one_batch_s": one_batch["latency_p99_s"],
        "p99_at_capacity_s": capacity["latency_p99_s"],
        "first_token_p50_at_capacity_s": capacity["first_token_p50_s"],
        "first_token_p99_at_capacity_s": capacity["first_token_p99_s"],
        "asked_per_second": rate,
        "accepted": answers.get("200", 0),
        "refused": answers.get("429", 0),
        "neither": sum(answers.values()) - answers.get("200", 0) - answers.get("429", 0),
        "refused_p50_s": found["refused_p50_s"],
        "refused_p99_s": found["refused_p99_s"],
        "accepted_first_token_p99_s": found["first_token_p99_s"],
        "accepted_p99_s": found["latency_p99_s"],
        "times_p99_at_capacity": found["latency_p99_s"] / capacity["latency_p99_s"],
        "times_p99_of_one_batch": found["latency_p99_s"] / one_batch["latency_p99_s"],
        "memory_growth_mib": memory[-1] - memory[min(10, len(memory) - 1)],
        "memory_mib": memory[-1],
        "next_request_s": single["latency_p50_s"],
    }


def main() -> None:
    options = parser(__doc__, repeats=3, threads=2)
    options.add_argument("--requests", type=int, default=192, help="by which capacity is measured")
    options.add_argument("--seconds", type=float, default=60.0)
    arguments = options.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = make_model(scratch / "model")
        for _ in range(arguments.repeats):
            with running(ours(scratch, model, {}, arguments.threads)) as server:
                found.append(overload(server, LIMIT + WAITING, arguments.requests, arguments.seconds))
                print(found[-1], file=sys.stderr, flush=True)
    settings = {
        "model": "random Llama of 6 M parameters, head dimension 32, float32, CPU",
        "seconds": arguments.seconds,
        "new_tokens": TOKENS,
        "rows": LIMIT,
        "waiting": WAITING,
        "replicas": 1,
    }
    emit(report("serve_overload", settings, gather(found), arguments.repeats, arguments.threads), arguments.output)


if __name__ == "__main__":
    main()
