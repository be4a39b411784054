"""`rlhf-ray serve` with `engine: vllm` as a user starts it: two replicas, each vLLM in a process of its own, on a real Ray."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.models.adapter_files import read_adapter
from rlhf_ray.registry import Registry
from tests.integration.service.conftest import HELLO, Service, start, stop

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, tiny_run: Any) -> Iterator[Service]:
    folder, base = tmp_path_factory.mktemp("service"), tiny_llama()
    runs = [tiny_run(folder / f"run{i}", base, seed=i, template="none") for i in range(2)]
    registry = Registry(folder / "registry")
    registry.promote(str(runs[0]), "helper", force=True, reason="nothing was measured")
    made = start(
        folder,
        model_name_or_path=str(base),
        registry=str(folder / "registry"),
        engine="vllm",
        vllm={"kv_cache_gb": 0.0625, "scoring_base": False},
        limits={"max_tokens": 100, "max_batch_rows": 8, "max_loaded_adapters": 4},
        replicas={"min_replicas": 2, "num_threads": 1},
    )
    made.runs = runs
    yield made
    stop(made)
    for path in (folder / "registry" / "adapters").glob("*"):
        path.chmod(0o755)


def ask(service: Service, model: str) -> str:
    found = service.client().chat.completions.create(model=model, messages=HELLO, seed=1, max_tokens=20)
    return str(found.choices[0].message.content)


def acknowledged(service: Service, version: int, sha256: str) -> bool:
    live = [status["live"].get("helper", {}) for status in service.replicas().values()]
    return len(live) == 2 and all((one.get("version"), one.get("sha256")) == (version, sha256) for one in live)


def test_promotion_rollback_and_the_death_of_a_replica(service: Service) -> None:
    """Every replica acknowledges each version by its hash, and then every reply is that version's; kill -9 of an engine's process
    costs no reply, and the one that comes in its place serves what is live."""
    assert "engine     vLLM 0." in service.log.read_text()
    registry = Registry(service.registry)
    promote = partial(registry.promote, force=True, reason="nothing was measured")
    hashes = [read_adapter(run / "adapter").sha256 for run in service.runs]
    service.wait(lambda: acknowledged(service, 1, hashes[0]))
    base, first = ask(service, "base"), ask(service, "helper")
    promote(str(service.runs[1]), "helper")
    service.wait(lambda: acknowledged(service, 2, hashes[1]))
    with ThreadPoolExecutor(8) as pool:
        replies = set(pool.map(lambda _: ask(service, "helper"), range(16)))
    assert len(replies) == 1 and not replies & {base, first}
    [second] = replies
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, service, "helper") for _ in range(24)]
        before = service.replicas()
        os.kill(next(iter(before.values()))["pid"], signal.SIGKILL)
        assert {done.result() for done in asked} == {second}
    service.wait(lambda: service.replicas().keys() != before.keys() and acknowledged(service, 2, hashes[1]), 180)
    registry.rollback("helper", reason="worse")
    service.wait(lambda: acknowledged(service, 1, hashes[0]))
    assert {ask(service, "helper") for _ in range(4)} == {first}


def test_what_it_has_no_base_to_compute_on(service: Service) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="kl: this service has no base to compute it on"):
        service.client().chat.completions.create(model="helper", messages=HELLO, extra_body={"kl": True})


def test_an_adapter_it_cannot_have_is_told_where_the_service_is_started(
    tmp_path: Path, tiny_llama: Any, tiny_run: Any
) -> None:
    """In one line, by the replica that could not start."""
    wide = tiny_run(tmp_path / "wide", tiny_llama(), seed=1, template="none", r=12)
    fields: dict[str, Any] = {"engine": "vllm", "vllm": {"kv_cache_gb": 0.0625, "max_lora_rank": 8}}
    with pytest.raises(AssertionError) as found:
        start(tmp_path, model_name_or_path=str(tiny_llama()), adapters={"wide": str(wide)}, **fields)
    said = [line for line in str(found.value).splitlines() if "rank above the engine's" in line]
    assert said and "expected at most 8; got 12; fix: raise vllm.max_lora_rank" in said[-1]
