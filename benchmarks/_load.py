"""Load on an endpoint with OpenAI's chat API, from a process of its own; prints what it met as JSON.

    python _load.py URL MODEL[,MODEL...] --clients 16 --requests 128     closed loop: each client asks again when it has its answer
    python _load.py URL MODEL --rate 200 --seconds 60                    open loop: asks at random moments, whatever comes back

Every request streams, so that the time to its first token is seen; request i asks model i modulo their number.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import aiohttp

WORDS = "the little bird was happy because a big red ball had a friend in the park and they played all day".split()


def prompt(number: int) -> str:
    """Other words for every request, so that no server can answer from a cache."""
    return " ".join(random.Random(number).choices(WORDS, k=12))


class Load:
    """tokens: of every reply (greedy).  at: seconds since the start at which each answer came, by what it was."""

    def __init__(self, client: aiohttp.ClientSession, models: Sequence[str], tokens: int) -> None:
        self.client, self.models, self.tokens = client, models, tokens
        self.first: list[float] = []
        self.whole: list[float] = []
        self.refused: list[float] = []
        self.said: Counter[str] = Counter()

    async def ask(self, number: int) -> None:
        body = {
            "model": self.models[number % len(self.models)],
            "messages": [{"role": "user", "content": prompt(number)}],
            "max_tokens": self.tokens,
            "temperature": 0.0,
            "stream": True,
        }
        started, first = time.perf_counter(), None
        try:
            async with self.client.post("/v1/chat/completions", json=body) as reply:
                if reply.status != 200:
                    await reply.read()
                    self.said[str(reply.status)] += 1
                    if reply.status == 429:
                        self.refused.append(time.perf_counter() - started)
                    return
                done = False
                async for line in reply.content:
                    if not line.startswith(b"data:"):
                        continue
                    if b"[DONE]" in line:
                        done = True
                    elif first is None and (choices := json.loads(line[5:]).get("choices")):
                        first = time.perf_counter() if choices[0]["delta"].get("content") else None
                    elif b'"finish_reason":"' in line or b'"finish_reason": "' in line:
                        done = True
        except aiohttp.ClientError as error:
            self.said[type(error).__name__] += 1
            return
        if not done or first is None:
            self.said["cut off"] += 1
            return
        self.said["200"] += 1
        self.first.append(first - started)
        self.whole.append(time.perf_counter() - started)

    async def closed(self, clients: int, requests: int) -> None:
        numbers = iter(range(requests))

        async def one() -> None:
            for number in numbers:
                await self.ask(number)

        await asyncio.gather(*(one() for _ in range(clients)))

    async def open(self, rate: float, seconds: float) -> None:
        draw, under_way, at, number = random.Random(0), set(), 0.0, 0
        started = time.perf_counter()
        while at < seconds:
            await asyncio.sleep(max(0.0, at - (time.perf_counter() - started)))
            under_way.add(asyncio.create_task(self.ask(number)))
            number += 1
            at += draw.expovariate(rate)
        await asyncio.gather(*under_way)


def percentile(values: Sequence[float], share: float) -> float | None:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    wait = aiohttp.ClientTimeout(total=300)
    # Servers close idle connections later than this: none is used at the moment in which it is closed.
    connections = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    async with aiohttp.ClientSession(arguments.url, timeout=wait, connector=connections) as client:
        load = Load(client, arguments.models.split(","), arguments.tokens)
        started = time.perf_counter()
        if arguments.rate:
            await load.open(arguments.rate, arguments.seconds)
        else:
            await load.closed(arguments.clients, arguments.requests)
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "answers": dict(load.said),
        "tokens_per_second": load.said["200"] * arguments.tokens / seconds,
        "requests_per_second": load.said["200"] / seconds,
        "first_token_p50_s": percentile(load.first, 0.5),
        "first_token_p99_s": percentile(load.first, 0.99),
        "latency_p50_s": percentile(load.whole, 0.5),
        "latency_p99_s": percentile(load.whole, 0.99),
        "refused_p50_s": percentile(load.refused, 0.5),
        "refused_p99_s": percentile(load.refused, 0.99),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("url")
    options.add_argument("models")
    options.add_argument("--clients", type=int, default=16)
    options.add_argument("--requests", type=int, default=64)
    options.add_argument("--rate", type=float, default=0.0)
    options.add_argument("--seconds", type=float, default=10.0)
    options.add_argument("--tokens", type=int, default=64)
    os.nice(5)  # the server's work comes first
    print(json.dumps(asyncio.run(run(options.parse_args()))))


if __name__ == "__main__":
    main()
