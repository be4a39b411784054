"""The whole service on real Ray: responses, hot changes under load, a killed replica, overload, metrics, a drain on Ctrl-C.

One service for all tests, in this order, under a proxy that is dead; the last one stops it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from rlhf_ray.errors import ArtifactError
from rlhf_ray.models.adapter_files import read_adapter
from rlhf_ray.registry import Registry
from rlhf_ray.serve.admission import CAPACITY_HEADER

from .conftest import DEAD_PROXY, HELLO, Service

pytestmark = pytest.mark.integration
CLIENTS = 4
PROXY_S = 25.0
"""Five times what it takes; Serve's own checks alone, three of 10 s, would take half a minute."""
LOAD = Path(__file__).parents[3] / "benchmarks" / "_load.py"


def alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def of_service(service: Service, name: str) -> list[int]:
    """Processes of the service's Ray that run this actor."""
    found = []
    for process in psutil.Process(service.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            words = process.cmdline()  # none, while a process that was killed gives its memory back
            found += [process.pid] * "".join(words[:1]).startswith(f"ray::{name}")
    return found


def flip(path: Path) -> None:
    """One bit of the file, whoever may write to it."""
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


class Load:
    """Clients that send requests without end. `failed`: their errors; `responses`: adapter id -> number of responses."""

    def __init__(self, service: Service, clients: int, retries: int = 2, **fields: Any) -> None:
        self.service, self.clients, self.retries, self.fields = service, clients, retries, {"max_tokens": 16, **fields}
        self.stopping = threading.Event()
        self.failed: list[str] = []
        self.responses: Counter[str] = Counter()

    def _run(self, number: int) -> None:
        ai = self.service.client(max_retries=self.retries)
        while not self.stopping.is_set():
            try:
                response = ai.chat.completions.create(model="helper", messages=HELLO, **self.fields)
                self.responses[response.model_extra["adapter"]["id"]] += 1
            except Exception as error:
                self.failed.append(f"{type(error).__name__} {error}")

    def __enter__(self) -> Load:
        self.pool = ThreadPoolExecutor(self.clients)
        self.futures = [self.pool.submit(self._run, i) for i in range(self.clients)]
        return self

    def __exit__(self, *exc: object) -> None:
        self.stopping.set()
        for future in self.futures:
            future.result()
        self.pool.shutdown()

    def until(self, count: int, seconds: float = 60, failures: int = 0) -> None:
        """Until `count` more responses have come, and no more than so many failures."""
        deadline, goal = time.monotonic() + seconds, self.responses.total() + count
        while self.responses.total() < goal:
            assert time.monotonic() < deadline and len(self.failed) <= failures, self.failed[:9]
            time.sleep(0.05)


def test_it_responds_streams_scores_and_lists(service: Service) -> None:
    ai = service.client()
    assert [m.id for m in ai.models.list() if "@" not in m.id] == ["base", "helper", "judge"]
    fields: dict[str, Any] = {"model": "helper", "messages": HELLO, "seed": 1, "max_tokens": 30}
    whole = ai.chat.completions.create(**fields, extra_body={"reward": True, "kl": True})
    assert isinstance(whole.choices[0].model_extra["reward"], float) and whole.choices[0].model_extra["kl"] != 0
    chunks = list(ai.chat.completions.create(**fields, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert len(service.replicas()) == 2
    with urllib.request.urlopen(f"{service.url}/", timeout=10) as page:
        assert b"playground" in page.read()


def test_it_answers_on_loopback_under_a_dead_proxy(service: Service) -> None:
    """Its own processes find each other, and so does a client that asks past the proxy."""
    assert DEAD_PROXY.items() <= psutil.Process(service.process.pid).environ().items()
    with urllib.request.urlopen(f"{service.url}/health", timeout=30) as answer:  # a replica's
        assert answer.status == 200
    for model in ("base", "helper"):
        assert service.client(max_retries=0).chat.completions.create(model=model, messages=HELLO, max_tokens=3).choices


def test_promotion_and_rollback_under_load_fail_no_request(service: Service) -> None:
    registry = Registry(service.registry)
    first = registry.resolve("helper")
    with Load(service, 4) as load:
        load.until(10)
        second = registry.promote(str(service.runs[1]), "helper", force=True, reason="nothing was measured").entry

        def all_serve(wanted: Any) -> bool:
            live = [status["live"]["helper"] for status in service.replicas().values()]
            return len(live) == 2 and all((v["id"], v["sha256"]) == (wanted.id, wanted.sha256) for v in live)

        def told(wanted: Any) -> int:
            return service.log.read_text().count(f"helper is now {wanted.id} ")

        service.wait(lambda: all_serve(second))
        before = load.responses[second.id]
        load.until(10)
        assert load.responses[second.id] > before
        # Waited for before the rollback: the log tells what the replicas serve when it looks, not what came and went in between.
        service.wait(lambda: told(second) == 2)
        told_first = told(first)
        registry.rollback("helper")
        service.wait(lambda: all_serve(first))
        load.until(10)
    assert load.failed == []
    assert second.sha256 == read_adapter(service.runs[1] / "adapter").sha256
    service.wait(lambda: told(first) == told_first + 2)


def test_overload_is_refused_fast_and_accepted_requests_are_answered(service: Service) -> None:
    """More clients than the capacity, without retries: 429 or a response, never anything else."""
    statuses: Counter[int] = Counter()
    refusals: list[float] = []
    stopping = threading.Event()

    def send() -> None:
        import openai

        ai = service.client(max_retries=0)
        while not stopping.is_set():
            started = time.monotonic()
            try:
                ai.chat.completions.create(model="helper", messages=HELLO, max_tokens=200, n=4)
                statuses[200] += 1
            except openai.APIStatusError as error:
                statuses[error.status_code] += 1
                refusals.append(time.monotonic() - started)
                assert error.response.headers["retry-after"] == "1"

    with ThreadPoolExecutor(24) as pool:
        futures = [pool.submit(send) for _ in range(24)]
        time.sleep(10)
        stopping.set()
        for future in futures:
            future.result()
    assert set(statuses) == {200, 429} and min(statuses.values()) > 0, statuses
    chat = service.client(max_retries=0).chat.completions
    answer = chat.with_raw_response.create(model="base", messages=HELLO, max_tokens=5)
    assert answer.parse().choices
    assert CAPACITY_HEADER.decode() not in answer.headers, (
        "Serve's proxy has not called admission.middlewares, which removes this header"
    )


def resident_mib(service: Service) -> float:
    """Memory of the service and of everything it has started."""
    processes = [psutil.Process(service.process.pid)]
    total = 0
    for process in [*processes, *processes[0].children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 2**20


@pytest.mark.fault
@pytest.mark.long
def test_a_minute_at_ten_times_the_capacity(service: Service, note: Any) -> None:
    """Fault 27. Excess requests are refused fast, memory stays flat, and the next request is answered as if nothing had been."""

    def load(*options: str) -> dict[str, Any]:
        command = [sys.executable, str(LOAD), service.url, "helper", "--tokens", "100", *options]
        return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))

    capacity = load("--clients", "16", "--requests", "200")
    assert set(capacity["answers"]) == {"200"}, capacity
    memory, stopping = [], threading.Event()

    def watch() -> None:
        while not stopping.wait(1.0):
            memory.append(resident_mib(service))

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = load("--rate", str(10 * capacity["requests_per_second"]), "--seconds", "60")
    stopping.set()
    watcher.join()
    started = time.monotonic()
    assert service.client(max_retries=0).chat.completions.create(model="helper", messages=HELLO, max_tokens=5).choices
    assert time.monotonic() - started < 15
    assert set(found["answers"]) == {"200", "429"}, found
    assert found["answers"]["429"] > found["answers"]["200"] and found["refused_p50_s"] < 0.1, found
    early, late = statistics.median(memory[10:20]), statistics.median(memory[-10:])
    figure = "answers 200 or 429, a refusal after {} s (median), memory flat, the next request answered"
    note(27, late < 1.05 * early, figure, found["refused_p50_s"])


def test_what_else_clients_ask_goes_through_ray_too(service: Service) -> None:
    """Health, tokens, HEAD and tools: through Serve's proxy and handles."""

    def ask(method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{service.url}{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()

    assert ask("GET", "/health") == (200, b"") and ask("HEAD", "/v1/models") == (200, b"")
    tokens = json.loads(ask("POST", "/tokenize", {"prompt": "a b"})[1])["tokens"]
    assert json.loads(ask("POST", "/detokenize", {"tokens": tokens[1:]})[1]) == {"prompt": "a b"}
    assert json.loads(ask("GET", "/tokenizer_info")[1])["eos_token"]
    asked = {
        "model": "base",
        "prompt": ["a", "b"],
        "n": 3,
        "max_tokens": 4,
        "presence_penalty": 1,
        "logit_bias": {"5": 1},
    }
    assert len(json.loads(ask("POST", "/v1/completions", asked)[1])["choices"]) == 6


def test_prometheus_finds_the_metrics(service: Service) -> None:
    wanted = {"completion_tokens", "replies", "time_to_first_token_seconds", "rows_running", "live_version", "refused"}
    missing: set[str] = set()

    def exported() -> bool:
        text = ""
        with suppress(OSError), urllib.request.urlopen(service.metrics_url, timeout=10) as page:
            text = page.read().decode()
        missing.clear()
        missing.update(name for name in wanted if f"ray_rlhf_ray_{name}" not in text)
        return not missing

    try:
        service.wait(exported, 90)
    except AssertionError:
        pytest.fail(f"not exported: {sorted(missing)}")


def test_its_ray_does_not_listen_for_other_machines(service: Service) -> None:
    """Ray's metrics, which ask for no token, were on every address. (Serve's replicas listen for each other on every address, in
    2.60; those ask for Ray's token.)"""
    main, listening = psutil.Process(service.process.pid), set[tuple[str, int, str]]()
    for process in (main, *main.children(recursive=True)):
        with suppress(psutil.Error):
            told = " ".join(process.cmdline())[:60]
            ends = [one.laddr for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
            listening.update((end.ip.removeprefix("::ffff:"), end.port, told) for end in ends)
    assert {urlsplit(url).port for url in (service.url, service.metrics_url)} <= {port for _, port, _ in listening}
    elsewhere = {told for ip, _, told in listening if ip not in ("127.0.0.1", "::1")}
    assert all(told.startswith("ray::ServeReplica") for told in elsewhere), listening


@pytest.mark.fault
@pytest.mark.parametrize("retries", [2, 0])
def test_a_killed_replica(service: Service, retries: int, note: Any) -> None:
    """Fault 24. Clients that retry twice, as OpenAI's do, see nothing of it; others lose the requests of that replica."""
    with Load(service, CLIENTS, retries, max_tokens=60) as load:
        load.until(8)
        victim = next(r["pid"] for r in service.replicas().values() if alive(r["pid"]))
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        load.until(40, 240, failures=0 if retries else CLIENTS)
        service.wait(lambda: sum(alive(r["pid"]) for r in service.replicas().values()) == 2, 240)
        took = time.monotonic() - killed
    lost = "no request failed" if retries else f"without retries at most the {CLIENTS} in flight failed"
    note(
        24, len(load.failed) <= (0 if retries else CLIENTS) and took < 120, f"{lost}; a new replica after {{}} s", took
    )


@pytest.mark.fault
def test_a_frozen_replica_is_ended_within_30_s_and_replaced(service: Service) -> None:
    """138 s before, and its process stayed. Streams from it end with an error event, a request that waits for it is answered."""
    pids = {replica: int(status["pid"]) for replica, status in service.replicas().items()}
    victim, stopping = min(pids), threading.Event()
    begun, broken = set[int](), list[Exception]()
    asked: dict[str, Any] = {"model": "base", "messages": HELLO, "extra_body": {"ignore_eos": True}}

    def stream(seed: int) -> None:
        """One after the other, so that there are some on each replica whenever it is frozen."""
        chat = service.client(max_retries=0, timeout=90).chat.completions
        while not stopping.is_set():
            try:
                for _ in chat.create(**asked, max_tokens=200, stream=True, seed=seed):
                    begun.add(seed)
            except Exception as error:
                broken.append(error)

    threads = [threading.Thread(target=stream, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    used = {pid: sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids.values()}
    # Serve may not know a replica yet that has just come: each must have written something, half a second of a core.
    service.wait(lambda: all(sum(psutil.Process(pid).cpu_times()[:2]) > used[pid] + 0.5 for pid in used))
    service.wait(lambda: len(begun) == len(threads))
    assert not broken
    started = time.monotonic()
    os.kill(pids[victim], signal.SIGSTOP)
    try:
        found = service.client(max_retries=0, timeout=50).chat.completions.create(**asked, max_tokens=5)
        assert found.choices[0].finish_reason == "length"
        service.wait(lambda: victim not in service.replicas(), 120)
        noticed = time.monotonic() - started  # what the service has timers for
        stopping.set()
        service.wait(lambda: len(service.replicas()) == 2, 240)
        replaced = time.monotonic() - started
        for thread in threads:
            thread.join(90)
        told = Counter(f"{type(error).__name__} {error}" for error in broken)
        print(f"ended after {noticed:.1f} s, replaced after {replaced:.1f} s, {told}")
        assert told.keys() == {"APIError The service failed on this request. Try again."}, told
        assert not any(thread.is_alive() for thread in threads) and not Path("/proc", str(pids[victim])).exists()
        assert noticed < 30
        first = re.search(r"up after (\d+) s", service.log.read_text())
        assert first and replaced < 30 + 3 * max(int(first[1]), 10), "how fast one starts is the machine's affair"
    finally:
        stopping.set()
        with suppress(ProcessLookupError):
            os.kill(pids[victim], signal.SIGCONT)


def test_the_controller_is_killed(service: Service, note: Any) -> None:
    """Fault 25. Requests do not pass through it; Ray starts it again."""
    with Load(service, CLIENTS, retries=0) as load:
        load.until(8)
        (victim,) = of_service(service, "ServeController")
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        load.until(40)
        service.wait(lambda: of_service(service, "ServeController") not in ([], [victim]))
        took = time.monotonic() - killed
        load.until(20)
    note(25, load.failed == [], "controller: no request failed; back after {} s", took)


@pytest.mark.fault
def test_the_proxy_is_killed(service: Service, note: Any) -> None:
    """Fault 25. No request is answered until the next proxy is there, with admission control in it."""
    (victim,) = of_service(service, "ProxyActor")
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    chat = service.client(max_retries=0).chat.completions.with_raw_response
    responses: list[Any] = []

    def answered() -> bool:
        with suppress(Exception):
            responses.append(chat.create(model="helper", messages=HELLO, max_tokens=5))
        return bool(responses)

    service.wait(answered, 60)
    took = time.monotonic() - killed
    assert responses[0].parse().choices and CAPACITY_HEADER.decode() not in responses[0].headers, (
        "there is no admission control in the new proxy"
    )
    assert of_service(service, "ProxyActor") != [victim]
    note(25, took <= PROXY_S, "proxy: requests are answered again after {} s", took)


@pytest.mark.fault
def test_a_damaged_adapter_is_promoted(service: Service, note: Any) -> None:
    """Fault 26. The registry refuses a damaged adapter; replicas refuse one that is damaged later, and the old one stays."""
    registry = Registry(service.registry)
    live, promote = registry.resolve("helper"), partial(registry.promote, force=True, reason="nothing was measured")
    damaged = shutil.copytree(service.runs[2], service.runs[2].with_name("damaged"))
    flip(damaged / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="sha256"):
        promote(str(damaged), "helper")
    with Load(service, CLIENTS, retries=0) as load:
        load.until(8)
        pids = [int(status["pid"]) for status in service.replicas().values() if alive(status["pid"])]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # so that neither reads it before it is damaged
        try:
            third = promote(str(service.runs[2]), "helper").entry
            flip(third.path / "adapter_model.safetensors")
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

        def all_refuse() -> bool:
            statuses = [r for r in service.replicas().values() if alive(r["pid"])]
            return len(statuses) == 2 and all(third.id in r["refused"] for r in statuses)

        service.wait(all_refuse)
        before = load.responses[live.id]
        load.until(20)
        assert load.responses[live.id] >= before + 20 and not load.responses[third.id]
    service.wait(lambda: f"refused {third.id}: " in service.log.read_text())
    registry.rollback("helper", f"v{live.version}")
    note(26, load.failed == [], "refused with the reason, no request failed, the old one stays")


def test_ctrl_c_lets_requests_that_run_finish(service: Service) -> None:
    stream = service.client(max_retries=0).chat.completions.create(
        model="base", messages=HELLO, max_tokens=200, n=8, temperature=0, stream=True
    )
    next(stream)  # it is being answered
    service.process.send_signal(signal.SIGINT)
    assert {choice.index for chunk in stream for choice in chunk.choices if choice.finish_reason} == set(range(8))
    assert service.process.wait(90) == 0
    log = service.log.read_text()
    assert "serve: stopped" in log and "Traceback" not in log
