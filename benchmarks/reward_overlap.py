"""What it gains to ask a reward server while later chunks are sampled, against asking it and waiting.

    python benchmarks/reward_overlap.py --output

PPO on stories260K in one process, 128 replies a step in chunks of 16; the reward is a server of this process that takes a while for
each request and then answers with the share of vowels. The baseline is the same code, told to do everything on one thread.
Interleaved; the first step of each run does not count. That the scores are the same, bit for bit, is a test (test_overlap.py).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from _common import data_folder, emit, parser, report, spread
from stories_sentiment import job

from rlhf_ray.config import PPOConfig
from rlhf_ray.console import LocalConsole
from rlhf_ray.metrics import read_metrics
from rlhf_ray.ppo import setup
from rlhf_ray.roles.scorer import Scorer
from rlhf_ray.stages.start import ppo

CHUNK = 16
NAMES = ("time/step", "time/generate", "time/score")


@contextmanager
def server(seconds: float) -> Iterator[str]:
    """A reward server on loopback that takes `seconds` for each request."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(seconds)
            rewards = [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in body["completions"]]
            raw = json.dumps({"ids": body["ids"], "rewards": rewards}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/score"
    finally:
        http.shutdown()
        http.server_close()


def measure(data: Path, steps: int, seconds: float, overlaps: bool) -> dict[str, float]:
    setup.Scorer = lambda *given, **how: Scorer(*given, **{**how, "overlaps": overlaps})  # type: ignore[assignment,misc]
    with tempfile.TemporaryDirectory() as scratch, server(seconds) as url:
        fields = job(Path(scratch) / "run", data, 0, steps + 1, 1).model_dump()
        own = {"rewards": [{"name": "vowels", "url": url}], "rollout_chunk_size": CHUNK, "eval_on_start": False}
        run = ppo(PPOConfig(**{**fields, **own, "eval_steps": steps + 1}), LocalConsole(quiet=True))
        rows = [row for row in read_metrics(Path(run.run_dir) / "metrics.jsonl") if row["step"] > 1]
    found = {name: statistics.median(row[name] for row in rows) for name in NAMES}
    print(f"overlaps {overlaps}: {found}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    options = parser(__doc__, repeats=2, threads=1)
    options.add_argument("--steps", type=int, default=2, help="steps of a run that count (default 2)")
    options.add_argument(
        "--seconds", type=float, default=0.25, help="that the server takes for a request (default 0.25)"
    )
    arguments = options.parse_args()
    data = data_folder()
    runs: dict[str, list[dict[str, float]]] = {"one thread": [], "beside": []}
    for _ in range(arguments.repeats):
        for name, found in runs.items():
            found.append(measure(data, arguments.steps, arguments.seconds, name == "beside"))
    measured: dict[str, Any] = {
        name: {key: spread([run[key] for run in found]) for key in NAMES} for name, found in runs.items()
    }
    pairs = zip(runs["beside"], runs["one thread"])
    measured["beside to one thread"] = spread([a["time/step"] / b["time/step"] for a, b in pairs])
    settings = {
        "model": "stories260K, 260,032 parameters, float32, CPU",
        "replies": 128,
        "chunk": CHUNK,
        "server, seconds per request": arguments.seconds,
        "steps": arguments.steps,
    }
    emit(report("reward_overlap", settings, measured, arguments.repeats, arguments.threads), arguments.output)


if __name__ == "__main__":
    main()
