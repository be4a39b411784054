"""A replica whose engine is vLLM beside one with the builtin engine: the same API, the same replies, promotion meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.errors import ConfigError, RlhfRayError
from rlhf_ray.models.adapter_files import read_adapter
from rlhf_ray.registry import Registry
from rlhf_ray.serve.replica import Replica
from tests.unit.serve.conftest import LiveService
from tests.unit.serve.test_http import HELLO, chat, client, send

VLLM: dict[str, Any] = {"engine": "vllm", "vllm": {"kv_cache_gb": 0.0625, "max_lora_rank": 8}}
LIMITS: dict[str, Any] = {
    "default_max_tokens": 16,
    "max_tokens": 150,
    "max_batch_rows": 8,
    "max_loaded_adapters": 4,
    "prompt_chunk": 32,
}


@pytest.fixture(scope="module")
def serve_job(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path], tiny_run: Any) -> Any:
    """serve_job(field=value, ...) -> a job with adapters `one`, `two` and `judge`, by the builtin engine."""
    root, base = tmp_path_factory.mktemp("served"), tiny_llama()
    runs = {
        name: str(tiny_run(root / name, base, stage=stage, seed=seed, template="none"))
        for name, stage, seed in (("one", "sft", 1), ("two", "ppo", 2), ("judge", "reward", 3))
    }
    made: list[ServeConfig] = []

    def make(**fields: Any) -> ServeConfig:
        values = {
            "output_dir": str(root / f"serve{len(made)}"),
            "model_name_or_path": str(base),
            "template": "none",
            "adapters": runs,
            "poll_interval_s": 0.05,
        }
        made.append(ServeConfig(**{**values, **fields, "limits": {**LIMITS, **fields.get("limits", {})}}))
        return made[-1]

    return make


@pytest.fixture(scope="module")
def builtin(serve_job: Any) -> Iterator[LiveService]:
    service = LiveService(serve_job())
    yield service
    service.close()


@pytest.fixture(scope="module")
def vllm(serve_job: Any) -> Iterator[LiveService]:
    service = LiveService(serve_job(**VLLM))
    yield service
    service.close()


def complete(service: LiveService, **fields: Any) -> Any:
    status, _, found = send(service, "POST", "/v1/completions", {"max_tokens": 12, **fields})
    return found if status == 200 else (status, found["error"]["message"])


def chats(service: LiveService, asked: list[dict[str, Any]]) -> list[tuple[int, Any]]:
    """All at once."""
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda fields: chat(service, **fields), asked))


def without_ids(answer: Any) -> Any:
    return {key: value for key, value in answer.items() if key not in ("id", "created")}


@pytest.mark.parametrize("model", ["base", "one", "two"])
def test_the_replies_of_the_builtin_engine(builtin: LiveService, vllm: LiveService, model: str) -> None:
    """24 chats at once, greedy and sampled, and the same as a stream: text, end, usage and fingerprint."""
    asked = [
        {
            "model": model,
            "messages": [{"role": "user", "content": f"Name bird {i}."}],
            "seed": i,
            "max_tokens": 5 + 3 * i,
        }
        | ({"temperature": 0} if i % 2 else {"temperature": 0.8, "top_p": 0.9})
        for i in range(24)
    ]
    mine, theirs = chats(builtin, asked), chats(vllm, asked)
    assert [status for status, _ in theirs] == [200] * 24
    assert [without_ids(answer) for _, answer in theirs] == [without_ids(answer) for _, answer in mine]
    ai = client(vllm)
    for fields, (_, whole) in list(zip(asked, theirs))[:6]:
        pieces = list(ai.chat.completions.create(**fields, stream=True))
        assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole["choices"][0]["message"]["content"]
        assert pieces[-1].choices[0].finish_reason == whole["choices"][0]["finish_reason"]


def test_a_comparison_with_rewards_and_kl(builtin: LiveService, vllm: LiveService) -> None:
    """One prompt through base and adapters in one batch, scored on the second base."""
    body = {"models": ["base", "one", "two"], "messages": HELLO, "seed": 4, "n": 2, "reward": "judge", "kl": True}
    (mine, theirs) = (send(service, "POST", "/v1/compare", body) for service in (builtin, vllm))
    assert mine[0] == theirs[0] == 200

    def numbers(found: Any) -> tuple[Any, list[float]]:
        values: list[float] = []

        def walk(node: Any) -> Any:
            if isinstance(node, dict):
                return {k: walk(v) for k, v in node.items() if k not in ("id", "created")}
            if isinstance(node, list):
                return [walk(v) for v in node]
            if isinstance(node, float):
                values.append(node)
                return "number"
            return node

        return walk(found), values

    (words, ours), (other_words, others) = numbers(mine[2]), numbers(theirs[2])
    assert words == other_words and len(ours) >= 10
    assert others == pytest.approx(ours, abs=1e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 1.5, "frequency_penalty": 0.5, "temperature": 0},
        {"repetition_penalty": 1.7, "seed": 1},
        {"logit_bias": {"70": 4, "71": 4}, "seed": 2},
        {"min_tokens": 20, "max_tokens": 30, "seed": 3, "logit_bias": {"2": 8}},
        {"top_k": 5, "min_p": 0.1, "seed": 4, "stop": ["e", "xyz"]},
        {"ignore_eos": True, "stop_token_ids": [101], "max_tokens": 60, "seed": 5},
        {"logprobs": 3, "seed": 6, "temperature": 0.5},
        {"echo": True, "logprobs": 2, "seed": 7},
        {"prompt_logprobs": 2, "seed": 8, "max_tokens": 1},
        {"n": 3, "best_of": 3, "seed": 9},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_field_does_what_it_does_elsewhere(
    builtin: LiveService, vllm: LiveService, fields: dict[str, Any]
) -> None:
    """vLLM computes logits, and what is done to them is done here: so nothing is refused that the builtin engine takes."""
    one, other = (complete(service, model="one", prompt="Name a bird and", **fields) for service in (builtin, vllm))
    assert [c["text"] for c in one["choices"]] == [c["text"] for c in other["choices"]]
    assert [c["finish_reason"] for c in one["choices"]] == [c["finish_reason"] for c in other["choices"]]
    for mine, theirs in zip(one["choices"], other["choices"]):
        if mine.get("logprobs"):
            ours, others = mine["logprobs"]["token_logprobs"], theirs["logprobs"]["token_logprobs"]
            assert [p for p in others if p is not None] == pytest.approx([p for p in ours if p is not None], abs=1e-3)
        if mine.get("prompt_logprobs"):
            assert [p and p.keys() for p in mine["prompt_logprobs"]] == [
                p and p.keys() for p in theirs["prompt_logprobs"]
            ]


def test_a_grammar_is_followed(builtin: LiveService, vllm: LiveService) -> None:
    """Token by token, beside rows without one; in reply to a prompt that is read in several parts too."""
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    asked = [
        {"model": "one", "seed": i, "max_tokens": 60, "messages": [{"role": "user", "content": "Name " * length}]}
        | ({"response_format": form} if i % 2 == 0 else {})
        for i, length in enumerate((1, 1, 40, 40, 3, 3))
    ]
    mine, theirs = chats(builtin, asked), chats(vllm, asked)
    assert [without_ids(answer) for _, answer in mine] == [without_ids(answer) for _, answer in theirs]
    assert theirs[0][1]["choices"][0]["message"]["content"].startswith("{")


def test_unknown_and_unfit_names(vllm: LiveService) -> None:
    assert chat(vllm, model="nobody")[0] == 404
    status, found = chat(vllm, model="judge")
    assert status == 400 and "is a reward model" in found["error"]["message"]
    assert complete(vllm, model="one", prompt=[9999])[0] == 400


def test_promoted_in_the_middle_of_a_reply(serve_job: Any, tiny_run: Any, tiny_llama: Any, tmp_path: Path) -> None:
    """The reply goes on under the version it began with, the next one is of the new version, and after a rollback of the old one:
    each as the version alone says it. The replica acknowledges id, version and sha256."""
    base, registry = tiny_llama(), Registry(tmp_path / "registry")
    promote = partial(registry.promote, force=True, reason="nothing was measured")
    runs = [tiny_run(tmp_path / f"run{i}", base, seed=i, template="none") for i in range(3)]
    ids = [promote(str(runs[0]), "helper").entry.id]
    service = LiveService(serve_job(**VLLM, registry=str(registry.path), adapters={}))
    try:
        fields: dict[str, Any] = {"messages": HELLO, "seed": 1, "max_tokens": 120, "extra_body": {"ignore_eos": True}}
        ai = client(service)

        def say(model: str) -> str:
            return str(ai.chat.completions.create(model=model, **fields).choices[0].message.content)

        first = say("helper")
        stream = iter(ai.chat.completions.create(model="helper", stream=True, **fields))
        text = next(stream).choices[0].delta.content or ""
        ids.append(promote(str(runs[1]), "helper").entry.id)
        acknowledged(service, "helper", ids[1])
        second = say("helper")
        text += "".join(piece.choices[0].delta.content or "" for piece in stream if piece.choices)
        assert text == first == say("helper@v1") and second == say("helper@v2") != first
        live = service.replica.watcher.status()["live"]["helper"]
        assert live == {"id": ids[1], "version": 2, "sha256": read_adapter(runs[1] / "adapter").sha256}
        registry.rollback("helper", reason="worse")
        acknowledged(service, "helper", ids[0])
        assert say("helper") == first
        wide = tiny_run(tmp_path / "wide", base, seed=9, template="none", r=16)
        refused = promote(str(wide), "helper").entry.id
        for _ in range(200):
            if refused in (found := service.replica.watcher.status())["refused"]:
                break
            service.call(asyncio.sleep(0.05))
        assert (
            "rank above the engine's; expected at most 8; got 16; fix: raise vllm.max_lora_rank"
            in found["refused"][refused]
        )
        assert say("helper") == first
    finally:
        service.close()


def acknowledged(service: LiveService, name: str, id: str) -> None:
    for _ in range(200):
        if service.replica.watcher.status()["live"][name]["id"] == id:
            return
        service.call(asyncio.sleep(0.05))
    raise AssertionError(service.replica.watcher.status())


def test_more_adapters_than_slots(
    serve_job: Any, builtin: LiveService, tiny_run: Any, tiny_llama: Any, tmp_path: Path
) -> None:
    """Six in two slots, asked for all at once: each reply is its own adapter's, however slots were taken and given back."""
    names = {f"a{i}": str(tiny_run(tmp_path / f"a{i}", tiny_llama(), seed=20 + i, template="none")) for i in range(6)}
    small = serve_job(**VLLM, adapters=names, limits={"max_loaded_adapters": 2})
    services = [LiveService(serve_job(adapters=names, limits={"max_loaded_adapters": 6})), LiveService(small)]
    asked = [{"model": f"a{i % 6}", "seed": i, "max_tokens": 15} for i in range(24)]
    try:
        mine, theirs = (chats(service, asked) for service in services)
        assert [without_ids(answer) for _, answer in mine] == [without_ids(answer) for _, answer in theirs]
        assert services[1].replica.adapter_cache.evictions >= 4
        held = services[1].replica.engine._vllm._in_worker(lambda w: w.model_runner.lora_manager.list_adapters())
        assert len(held) == len(services[1].replica.adapter_cache.keys()) <= 2
    finally:
        for service in services:
            service.close()


def test_weights_that_are_not_finite_fail_alone(
    serve_job: Any, builtin: LiveService, tiny_run: Any, tiny_llama: Any, tmp_path: Path
) -> None:
    """Rows of a broken adapter end with an error; rows beside them, and those that get their blocks of the cache, do not notice."""
    broken = tiny_run(tmp_path / "broken", tiny_llama(), seed=30, template="none")
    spoil(broken / "adapter")
    config = serve_job(**VLLM)
    service = LiveService(
        config.model_copy(update={"adapters": {**config.adapters, "broken": str(broken / "adapter")}})
    )
    asked = [{"model": "broken" if i % 3 == 0 else "one", "seed": i, "max_tokens": 20} for i in range(24)]
    try:
        found = chats(service, asked)
        assert [status for status, _ in found] == [500 if i % 3 == 0 else 200 for i in range(24)]
        good = [(f, answer) for f, (status, answer) in zip(asked, found) if status == 200]
        assert [without_ids(answer) for _, answer in good] == [without_ids(chat(builtin, **f)[1]) for f, _ in good]
    finally:
        service.close()


def spoil(adapter: Path) -> None:
    """Weights that are finite, and whose products are not."""
    file = adapter / "adapter_model.safetensors"
    tensors = {key: tensor * 1e25 for key, tensor in load_file(file).items()}
    file.chmod(0o644)
    save_file(tensors, file)


def test_without_a_scoring_base(serve_job: Any, vllm: LiveService) -> None:
    """The same replies with no second base in memory; what needs one is refused, by the name of the field."""
    alone = LiveService(serve_job(engine="vllm", vllm={**VLLM["vllm"], "scoring_base": False}))
    try:
        assert all(p.device.type == "meta" for p in alone.replica.backbone.model.parameters())
        for fields in (
            {"model": "base", "seed": 1},
            {"model": "two", "temperature": 0, "logprobs": True, "top_logprobs": 2},
        ):
            assert without_ids(chat(alone, **fields)[1]) == without_ids(chat(vllm, **fields)[1])
        for fields, name in (
            ({"reward": "judge"}, "reward"),
            ({"kl": True}, "kl"),
        ):
            status, found = chat(alone, model="one", **fields)
            assert (status, found["error"]["param"]) == (400, name)
            assert "its operator has set vllm.scoring_base: false" in found["error"]["message"]
        assert complete(alone, model="one", prompt="a", echo=True)["choices"][0]["text"].startswith("a")
        assert complete(alone, model="one", prompt="a", echo=True, logprobs=1)[0] == 400
        assert complete(alone, model="one", prompt="a", prompt_logprobs=1)[0] == 400
        assert send(alone, "POST", "/v1/score", {"model": "judge", "prompts": ["a"], "completions": ["b"]})[0] == 400
    finally:
        alone.close()


class TestWhatIsRefusedAtTheStart:
    def test_a_rank_above_the_engines(self, serve_job: Any, tiny_run: Any, tiny_llama: Any, tmp_path: Path) -> None:
        wide = tiny_run(tmp_path / "wide", tiny_llama(), seed=1, r=12)
        config = serve_job(**VLLM, adapters={"wide": str(wide)})
        with pytest.raises(
            ConfigError, match=r"rank above the engine's; expected at most 8; got 12; fix: raise vllm.max_lora"
        ):
            start(config)

    def test_an_adapter_of_another_base(self, serve_job: Any, tiny_run: Any, tiny_llama: Any, tmp_path: Path) -> None:
        other = tiny_run(tmp_path / "other", tiny_llama(seed=5), seed=1)
        with pytest.raises(RlhfRayError, match="another base"):
            start(serve_job(**VLLM, adapters={"other": str(other)}))

    def test_a_family_that_vllm_does_not_adapt(self, tiny_gpt2: Any, serve_job: Any) -> None:
        config = serve_job(**VLLM, adapters={}, model_name_or_path=str(tiny_gpt2()))
        with pytest.raises(
            ConfigError, match=r"^engine: vLLM .* GPT2LMHeadModel does not support LoRA yet.*set engine: builtin"
        ):
            start(config)


def start(config: ServeConfig) -> None:
    async def run() -> None:
        Replica(config)

    asyncio.run(run())
