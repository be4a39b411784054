"""A replica without Ray: its responses, scores and errors, and how it follows the registry. Real model, registry, threads."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config.serve import LimitsConfig, ServeConfig
from rlhf_ray.data.encode import encode_prompts
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.templates import load_template
from rlhf_ray.errors import ConfigError
from rlhf_ray.maths.rng import derived_seed
from rlhf_ray.models.adapter_files import read_adapter
from rlhf_ray.models.adapters import wrap
from rlhf_ray.models.batching import Batching
from rlhf_ray.models.heads import ScalarHead
from rlhf_ray.models.role_models import AdapterStack, RoleBinding, RoleModels
from rlhf_ray.registry import Registry
from rlhf_ray.rewards.retokenised import Reader
from rlhf_ray.rewards.sources import ModelReward
from rlhf_ray.sampler.engine import Sampler
from rlhf_ray.sampler.requests import DecodeRequest, DecodeResult
from rlhf_ray.serve.generation import GenerationRequest
from rlhf_ray.serve.metrics import NoMetrics
from rlhf_ray.serve.prompt_encoder import PromptEncoder
from rlhf_ray.serve.replica import Replica
from rlhf_ray.serve.template_date import with_template_date

from .conftest import load_tiny

PROMPT = {"text": "Name a bird."}
WITH_TEMPLATES = (("base", "none"), ("one", "alpaca_short"), ("two", "alpaca_short"))


@pytest.fixture
def job(tmp_path: Path, base_dir: Path) -> Callable[..., ServeConfig]:
    def make(**fields: Any) -> ServeConfig:
        values: dict[str, Any] = {"output_dir": str(tmp_path / "serve"), "model_name_or_path": str(base_dir)}
        limits = {"default_max_tokens": 16, "max_tokens": 100, **fields.pop("limits", {})}
        return ServeConfig(**{**values, "template": "none", "poll_interval_s": 0.05, "limits": limits, **fields})

    return make


def test_a_raw_prompt_that_spells_special_tokens_means_them(backbone: Any) -> None:
    """As of /v1/completions in other services: <s>, a, </s> are 3 tokens (was: 1 + 9), and bos is not set twice."""
    encoder = PromptEncoder(backbone, LimitsConfig())
    (a,) = backbone.tokenizer("a", add_special_tokens=False).input_ids
    for text in ("a</s>", "<s>a</s>"):
        assert encoder.tokenize({"raw": text}, load_template("none")) == (1, a, 2)
    assert len(encoder.tokenize({"text": "a</s>"}, load_template("none"))) == 1 + 5
    assert len(encoder.tokenize({"raw": " "}, load_template("none"))) == 2


@asynccontextmanager
async def serving(config: ServeConfig) -> AsyncIterator[Replica]:
    replica = Replica(config)
    try:
        await replica.start()
        yield replica
    finally:
        await replica.close()


def run(config: ServeConfig, body: Callable[[Replica], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        async with serving(config) as replica:
            return await body(replica)

    return asyncio.run(whole())


async def generate(replica: Replica, *models: str, prompt: Any = PROMPT, **fields: Any) -> dict[str, Any]:
    """{start, choices: [{text, end, ...}], error}."""
    found: dict[str, Any] = {"choices": {}, "error": None}
    async for events in replica.events(GenerationRequest(models=models, prompts=(prompt,), **fields)):
        for event in events:
            if "i" in event:
                choice = found["choices"].setdefault(event["i"], {"text": "", "tokens": []})
                choice["text"] += event.pop("text", "")
                choice["tokens"] += event.pop("tokens", [])
                choice.update(event)
            else:
                found.update(event)
    return found


def alone(
    base: Path, run_dir: Path | None, template: str, seed: int, **fields: Any
) -> tuple[str, DecodeResult, list[int]]:
    """The response of an adapter by itself, by the sampler that training uses: its text, the result, the prompt's ids."""
    backbone = load_tiny(base)
    model = backbone.model if run_dir is None else wrap(backbone.model, read_adapter(run_dir / "adapter"), "x")
    ids = encode_prompts(backbone.tokenizer, load_template(template), [Prompt("Name a bird.")])[0]
    asked = DecodeRequest(tuple(ids), seed, 16, backbone.eos_ids, adapter=None if run_dir is None else "x", **fields)
    result = Sampler(model, backbone.pad_id).run([asked])[0]
    return str(backbone.tokenizer.decode(result.token_ids, skip_special_tokens=True)), result, ids


def test_adapters_in_one_batch_respond_as_each_does_alone_under_its_own_template(
    job: Callable[..., ServeConfig], tiny_run: Callable[..., Path], base_dir: Path, tmp_path: Path
) -> None:
    one = tiny_run(tmp_path / "one", base_dir, seed=1)
    two = tiny_run(tmp_path / "two", base_dir, seed=2, template="vigogne")

    async def body(replica: Replica) -> Any:
        together = await generate(replica, "base", "one", "two", seed=7)
        apart = await asyncio.gather(*(generate(replica, name, seed=7, n=2) for name in ("base", "one", "two")))
        return together, apart

    together, apart = run(job(adapters={"one": str(one), "two": str(two)}), body)
    expected = [
        alone(base_dir, folder, template, derived_seed(7, "serve", 0, 0))[0]
        for folder, template in ((None, "none"), (one, "alpaca_short"), (two, "vigogne"))
    ]
    assert [together["choices"][i]["text"] for i in range(3)] == expected
    assert [found["choices"][0]["text"] for found in apart] == expected
    assert all(
        found["choices"][1]["text"] != found["choices"][0]["text"] for found in apart
    )  # the second sample is another
    assert together["start"]["choices"] == ["base", "one", "two"]
    assert together["start"]["adapters"]["one"]["sha256"] == read_adapter(one / "adapter").sha256


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "lfm2", "granitemoehybrid"])
def test_adapters_of_a_hybrid_share_a_batch_and_its_states(
    model_type: str,
    job: Callable[..., ServeConfig],
    tiny_run: Callable[..., Path],
    tiny_hybrid: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = tiny_hybrid(model_type=model_type)
    runs = {name: tiny_run(tmp_path / name, base, seed=i) for i, name in enumerate(("one", "two"))}

    async def body(replica: Replica) -> Any:
        long = {"text": PROMPT["text"] * 3}
        return await asyncio.gather(
            generate(replica, "base", "one", "two", seed=7),
            *(generate(replica, name, seed=i, prompt=long, n=2) for i, name in enumerate(("two", "base", "one"))),
            *(generate(replica, name, seed=7) for name in ("base", "one", "two")),
        )

    made = {name: str(folder) for name, folder in runs.items()}
    together, *_, of_base, of_one, of_two = run(job(model_name_or_path=str(base), adapters=made), body)
    seed = derived_seed(7, "serve", 0, 0)
    expected = [alone(base, runs.get(name), template, seed)[0] for name, template in WITH_TEMPLATES]
    assert [together["choices"][i]["text"] for i in range(3)] == expected and len(set(expected)) == 3
    assert [found["choices"][0]["text"] for found in (of_base, of_one, of_two)] == expected


def test_adapters_in_groups_by_length_respond_as_each_does_alone(
    job: Callable[..., ServeConfig],
    tiny_run: Callable[..., Path],
    base_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The decode thread keeps one session around all steps, in which each group's adapters must stay where they are."""
    opened = []
    new_group = Sampler._new_group
    monkeypatch.setattr(Sampler, "_new_group", lambda sampler: opened.append(1) or new_group(sampler))
    runs = {name: str(tiny_run(tmp_path / name, base_dir, seed=i, template="none")) for i, name in enumerate("abcd")}
    long = {"text": PROMPT["text"] * 12}

    async def body(replica: Replica) -> Any:
        asked = [
            ("a", {}),
            ("b", {}),
            ("base", {}),
            ("c", {"prompt": long}),
            ("d", {"prompt": long}),
            ("a", {"seed": 8}),
        ]
        calls = [partial(generate, replica, name, **{"seed": 7, "n": 2, **fields}) for name, fields in asked]
        return await asyncio.gather(*(call() for call in calls)), [await call() for call in calls]

    together, apart = run(job(adapters=runs, limits={"max_cached_tokens": 1000, "default_max_tokens": 40}), body)
    assert [found["choices"] for found in together] == [found["choices"] for found in apart]
    assert opened and not any(found["error"] for found in together)


def test_live_versions_are_exported_again_and_again(
    job: Callable[..., ServeConfig], tiny_run: Callable[..., Path], base_dir: Path, tmp_path: Path
) -> None:
    """Ray drops a gauge that is set once, when its adapter goes live: a minute later Prometheus found no live_version."""

    class Recorded(NoMetrics):
        def __init__(self) -> None:
            self.gauges: dict[tuple[str, str], float] = {}

        def set(self, name: str, value: float, **tags: str) -> None:
            self.gauges[name, tags.get("adapter", "")] = value

    one = tiny_run(tmp_path / "one", base_dir, seed=1)

    async def body(replica: Replica) -> Any:
        later = Recorded()
        replica.metrics = replica.watcher.metrics = later
        replica.export_gauges()
        return later.gauges

    found = run(job(adapters={"one": str(one)}), body)
    assert found["live_version", "one"] == 0 and ("rows_running", "") in found, "a run of the job file has no number"


def test_reward_and_kl_are_those_of_training(
    job: Callable[..., ServeConfig], tiny_run: Callable[..., Path], base_dir: Path, tmp_path: Path
) -> None:
    policy = tiny_run(tmp_path / "policy", base_dir, stage="ppo", seed=1)
    reward = tiny_run(tmp_path / "reward", base_dir, stage="reward", seed=5)
    config = job(adapters={"policy": str(policy), "judge": str(reward)})
    found = run(config, lambda replica: generate(replica, "policy", "base", seed=3, reward=True, kl=True))

    backbone = load_tiny(base_dir)
    files = read_adapter(reward / "adapter")
    stack = AdapterStack(backbone, wrap(backbone.model, files, "reward"))
    stack.heads["reward"] = ScalarHead(backbone.hidden_size, files.head)
    models = RoleModels({"s": stack}, {"reward": RoleBinding("s", "reward", "reward"), "base": RoleBinding("s", None)})
    _, result, ids = alone(base_dir, policy, "alpaca_short", derived_seed(3, "serve", 0, 0))
    seq = Reader(backbone, None, False).sequences([ids], [list(result.token_ids)])  # type: ignore[arg-type]
    with torch.no_grad():
        score = (
            ModelReward("reward", 1.0, models, "reward", Batching(8), torch.device("cpu")).score_sequences(seq).item()
        )
        base = models("logprobs", "base", seq, 1.0)[0].sum().item()
    assert found["choices"][0]["reward"] == pytest.approx(score, abs=1e-4)
    assert found["choices"][0]["kl"] == pytest.approx(sum(result.logprobs) - base, abs=1e-3)
    assert abs(found["choices"][0]["kl"]) > 0.1
    assert found["choices"][1]["kl"] == 0.0
    refused = run(config, lambda replica: generate(replica, "judge"))
    assert refused["error"]["status"] == 400 and refused["error"]["code"] == "not_a_policy"
    refused = run(job(), lambda replica: generate(replica, "base", reward=True))
    assert refused["error"]["code"] == "no_reward"


def test_reward_and_kl_leave_out_what_a_stop_string_hid(
    job: Callable[..., ServeConfig], tiny_run: Callable[..., Path], base_dir: Path, tmp_path: Path
) -> None:
    """They are those of the tokens that are listed with the reply, without those of the stop string and what came after it."""
    policy = tiny_run(tmp_path / "policy", base_dir, stage="ppo", seed=1)
    reward = tiny_run(tmp_path / "reward", base_dir, stage="reward", seed=5)
    config = job(adapters={"policy": str(policy), "judge": str(reward)})
    text, result, ids = alone(base_dir, policy, "alpaca_short", derived_seed(3, "serve", 0, 0))
    stop = text[7:9]
    assert text.index(stop) > 2

    def ask(replica: Replica) -> Any:
        return generate(replica, "policy", seed=3, stop_strings=(stop,), logprobs=True, reward=True, kl=True)

    found = run(config, ask)["choices"][0]
    backbone, count = load_tiny(base_dir), len(found["tokens"])
    assert found["text"] == text[: text.index(stop)] == "".join(token for token, _ in found["tokens"])
    assert backbone.tokenizer.decode(result.token_ids[:count], skip_special_tokens=True) == found["text"]
    assert 0 < count < found["completion_tokens"] and found["end"] == "stop"
    assert [value for _, value in found["tokens"]] == pytest.approx(result.logprobs[:count], abs=1e-4)
    files = read_adapter(reward / "adapter")
    stack = AdapterStack(backbone, wrap(backbone.model, files, "reward"))
    stack.heads["reward"] = ScalarHead(backbone.hidden_size, files.head)
    models = RoleModels({"s": stack}, {"reward": RoleBinding("s", "reward", "reward"), "base": RoleBinding("s", None)})
    seq = Reader(backbone, None, False).sequences([ids], [list(result.token_ids[:count])])  # type: ignore[arg-type]
    with torch.no_grad():
        score = (
            ModelReward("reward", 1.0, models, "reward", Batching(8), torch.device("cpu")).score_sequences(seq).item()
        )
        base = models("logprobs", "base", seq, 1.0)[0].sum().item()
    assert found["reward"] == pytest.approx(score, abs=1e-4)
    assert found["kl"] == pytest.approx(sum(result.logprobs[:count]) - base, abs=1e-3)


def test_stop_strings_log_probabilities_and_greedy(job: Callable[..., ServeConfig], base_dir: Path) -> None:
    async def body(replica: Replica) -> None:
        whole = await generate(replica, "base", seed=1, logprobs=True, max_tokens=30)
        response = whole["choices"][0]
        assert len(response["tokens"]) == response["completion_tokens"] == 30 and response["end"] == "length"
        assert all(value <= 0 for _, value in response["tokens"])
        stop = response["text"][9:12]
        cut = await generate(replica, "base", seed=1, stop_strings=(stop,), max_tokens=30)
        before = response["text"][: response["text"].index(stop)]
        assert (cut["choices"][0]["text"], cut["choices"][0]["end"]) == (before, "stop")
        assert cut["choices"][0]["completion_tokens"] < 30
        greedy = [(await generate(replica, "base", temperature=0.0))["choices"][0]["text"] for _ in range(2)]
        assert greedy[0] == greedy[1] == alone(base_dir, None, "none", 0, greedy=True)[0]
        assert replica.engine.running == 0 and not replica._claims and not replica.router.buffers

    run(job(), body)


def test_bad_requests_are_errors_with_a_status(
    job: Callable[..., ServeConfig], tiny_run: Callable[..., Path], base_dir: Path, tmp_path: Path
) -> None:
    one = tiny_run(tmp_path / "one", base_dir, seed=1)
    conversation = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]}

    async def body(replica: Replica) -> None:
        for models, fields, status, code in (
            (("nobody",), {}, 404, "model_not_found"),
            (("../one",), {}, 404, "model_not_found"),
            (("one@v9",), {}, 404, "model_not_found"),
            (("base",), {"prompt": {"text": "  "}}, 400, "empty_prompt"),
            (("base",), {"prompt": {"ids": [5000]}}, 400, "invalid_token"),
            (("base",), {"max_tokens": 250}, 400, "context_length_exceeded"),
            (("one",), {"prompt": conversation}, 400, "template"),
            (("base",), {"n": 5000}, 400, "too_many_replies"),
        ):
            error = (await generate(replica, *models, **fields))["error"]
            assert (error["status"], error["code"]) == (status, code)
        assert (await generate(replica, "one@v0"))["error"] is None
        assert (
            not replica._claims
            and replica.adapter_cache._cached["one@v0-" + read_adapter(one / "adapter").sha256[:8]].users == 0
        )

    run(job(adapters={"one": str(one)}), body)


def test_a_full_replica_refuses_at_once_and_a_deadline_holds(job: Callable[..., ServeConfig]) -> None:
    async def body(replica: Replica) -> None:
        running = [replica.events(GenerationRequest(("base",), (PROMPT,), max_tokens=100)) for _ in range(4)]
        for first in running:
            await anext(first)
        full = (await generate(replica, "base"))["error"]
        assert (full["status"], full["retry_after"]) == (429, 1)
        for first in running:
            await first.aclose()  # the client disconnects
        assert (await generate(replica, "base"))["error"] is None
        assert replica.engine.running == 0 and replica.engine.steps < 100

    run(job(limits={"max_batch_rows": 2, "max_waiting_rows": 2}), body)
    refused = run(job(limits={"request_timeout_s": 0.001}), lambda replica: generate(replica, "base", max_tokens=100))
    assert refused["error"]["status"] == 504


def test_a_health_check_decodes_a_token(job: Callable[..., ServeConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(replica: Replica) -> None:
        await replica.check_health()
        steps = replica.engine.steps
        assert steps > 0
        await replica.check_health()
        assert replica.engine.steps > steps

        def broken() -> list[object]:
            replica.engine.sampler._clear()
            raise RuntimeError("broken")

        monkeypatch.setattr(replica.engine.sampler, "step", broken)
        with pytest.raises(RuntimeError, match="decoder has failed"):
            await replica.check_health()

    run(job(), body)


def test_a_health_check_counts_scoring_as_work(job: Callable[..., ServeConfig]) -> None:
    """A replica that scored was ended: the steps of its rows stood still."""
    hold = threading.Event()

    async def body(replica: Replica) -> None:
        await replica.check_health()
        await asyncio.wrap_future(replica.engine.call(lambda model: None))
        replica.engine.call(lambda model: hold.wait(30))
        ticket = replica.engine.submit(DecodeRequest((1, 5), 0, 1, ()))
        try:
            await asyncio.wait_for(replica.check_health(), 3)
        finally:
            replica.engine.cancel(ticket)
            hold.set()

    run(job(), body)


DATED = (
    "{{ 'Today is ' + strftime_now('%d %b %Y') + '. ' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' So: ' }}{% endif %}"
)


def test_the_base_says_the_date_that_the_adapters_beside_it_say(
    job: Callable[..., ServeConfig], tmp_path: Path, chat_llama: Callable[..., Path], tiny_run: Callable[..., Path]
) -> None:
    """It asked the clock, and so read another prompt than the adapters that it is compared with."""
    base, then, later = chat_llama(chat_template=DATED), "2020-02-03T04:05:06", "2021-01-01T00:00:00"
    made = {"a": ("sft", then), "b": ("ppo", then), "c": ("sft", later), "judge": ("reward", later)}
    runs = {
        name: str(tiny_run(tmp_path / name, base, stage, seed=i, template="chat", template_date=date))
        for i, (name, (stage, date)) in enumerate(made.items())
    }
    registry = Registry(tmp_path / "registry")
    registry.promote(runs["b"], "helper", force=True, reason="nothing was measured")
    registry.promote(runs["judge"], "judge", force=True, reason="nothing was measured")

    def config(*names: str, **fields: Any) -> ServeConfig:
        given = {"model_name_or_path": str(base), "template": None, **fields}
        return with_template_date(job(adapters={name: runs[name] for name in names}, **given))

    def is_now(date: str | None) -> bool:
        return date is not None and abs((datetime.now() - datetime.fromisoformat(date)).total_seconds()) < 600

    assert config("a", "b", "judge").template_date == then
    assert config("a", registry=str(registry.path)).template_date == config(registry=str(registry.path)).template_date
    assert config(registry=str(registry.path)).template_date == then
    assert is_now(config("c", registry=str(registry.path)).template_date), "they do not agree"
    assert is_now(config("judge").template_date) and config("a", template_date=later).template_date == later

    async def body(replica: Replica) -> None:
        told = [await replica.tokenize(name, PROMPT) for name in ("base", "a")]
        assert told[0]["ids"] == told[1]["ids"]
        assert (await replica.detokenize(told[0]["ids"]))["text"].startswith("Today is 03 Feb 2020.")

    run(config("a"), body)


def test_promotion_and_rollback_without_a_restart_and_a_corrupt_version_never_takes_over(
    job: Callable[..., ServeConfig], tiny_run: Callable[..., Path], base_dir: Path, tmp_path: Path
) -> None:
    registry = Registry(tmp_path / "registry")
    promote = partial(registry.promote, force=True, reason="nothing was measured")
    runs = [tiny_run(tmp_path / f"run{i}", base_dir, seed=i) for i in range(4)]
    ids = [promote(str(runs[0]), "helper").entry.id]
    expected = [alone(base_dir, r, "alpaca_short", derived_seed(0, "serve", 0, 0))[0] for r in runs]

    async def response_text(replica: Replica, model: str = "helper") -> str:
        found = await generate(replica, model, seed=0)
        return str(found["choices"][0]["text"]) if found["error"] is None else str(found["error"]["status"])

    async def until(replica: Replica, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        for _ in range(600):
            status = json.loads(replica.watcher.status_file.read_text())
            if what(status):
                return status  # type: ignore[no-any-return]
            await asyncio.sleep(0.05)
        raise AssertionError(status)

    async def body(replica: Replica) -> None:
        assert await response_text(replica) == expected[0]
        running = replica.events(GenerationRequest(("helper",), (PROMPT,), seed=0, max_tokens=60))
        assert (await anext(running))[0]["start"]["adapters"]["helper"]["id"] == ids[0]
        ids.append(promote(str(runs[1]), "helper").entry.id)
        status = await until(replica, lambda s: s["live"]["helper"]["version"] == 2)
        assert status["live"]["helper"] == {
            "id": ids[1],
            "version": 2,
            "sha256": read_adapter(runs[1] / "adapter").sha256,
        }
        assert await response_text(replica) == expected[1]
        assert await response_text(replica, "helper@v1") == expected[0]
        text = "".join([e.get("text", "") for events in [x async for x in running] for e in events])
        assert text.startswith(expected[0])  # it began with version 1, and finished with it
        third = promote(str(runs[2]), "helper").entry
        weights = third.path / "adapter_model.safetensors"
        os.chmod(weights, stat.S_IRUSR | stat.S_IWUSR)
        data = bytearray(weights.read_bytes())
        data[-5] ^= 1
        weights.write_bytes(bytes(data))
        status = await until(replica, lambda s: third.id in s["refused"])
        assert status["live"]["helper"]["version"] == 2 and "sha256" in status["refused"][third.id]
        assert await response_text(replica) == expected[1]
        assert await response_text(replica, "helper@v3") == "503"
        registry.rollback("helper", "v1")
        await until(replica, lambda s: s["live"]["helper"]["version"] == 1)
        assert await response_text(replica) == expected[0]
        promote(str(runs[3]), "other")
        await until(replica, lambda s: "other" in s["live"])
        assert await response_text(replica, "other") == expected[3]
        listed = {entry["id"]: entry for entry in await replica.models()}
        assert (
            listed["helper"]["root"] == ids[0]
            and listed["helper"]["parent"] == "base"
            and listed["base"]["parent"] is None
        )
        assert third.id not in listed and {*ids} <= listed.keys()

    run(job(registry=str(tmp_path / "registry")), body)


@pytest.mark.parametrize(
    ("base", "given", "expected"), [("chat", None, "chat"), ("plain", None, "alpaca"), ("plain", "vigogne", "vigogne")]
)
def test_an_adapter_folder_that_records_no_template_is_asked_as_the_base_is(
    job: Callable[..., ServeConfig],
    saved_by_peft: Callable[..., Any],
    base_dir: Path,
    chat_llama: Callable[..., Path],
    tmp_path: Path,
    base: str,
    given: str | None,
    expected: str,
) -> None:
    """Others' adapters on a chat model were asked in Alpaca's words, 104 tokens for 7, while the base got its chat template."""
    folder = chat_llama() if base == "chat" else base_dir
    saved_by_peft(folder, tmp_path / "theirs", std=0.4, target_modules=["q_proj"])
    tokenizer = load_tiny(folder).tokenizer

    async def body(replica: Replica) -> Any:
        return await replica.tokenize("helper", PROMPT), await replica.models()

    config = job(adapters={"helper": str(tmp_path / "theirs")}, model_name_or_path=str(folder), template=given)
    tokens, models = run(config, body)
    assert tokens["ids"] == encode_prompts(tokenizer, load_template(expected, tokenizer), [Prompt("Name a bird.")])[0]
    assert next(m for m in models if m["id"] == "helper")["template"] == expected


def test_an_adapter_that_is_more_than_lora_is_served_alone(
    job: Callable[..., ServeConfig], saved_by_peft: Callable[..., Any], base_dir: Path, tmp_path: Path
) -> None:
    """DoRA: merged into the base, which is then no model of its own; beside others it is refused before anything is loaded."""
    dora = {"target_modules": ["q_proj", "v_proj"], "use_dora": True}
    theirs = saved_by_peft(base_dir, tmp_path / "more", std=0.4, **dora)
    tokenizer = load_tiny(base_dir).tokenizer
    ids = encode_prompts(tokenizer, load_template("alpaca"), [Prompt("Name a bird.")])[0]
    with torch.no_grad():
        said = theirs.generate(input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=16, eos_token_id=2)
    expected = tokenizer.decode(said[0, len(ids) :], skip_special_tokens=True)

    async def body(replica: Replica) -> Any:
        found = await generate(replica, "helper", temperature=0.0)
        version = found["start"]["adapters"]["helper"]["id"]
        again = await generate(replica, version, temperature=0.0)
        refused = [await generate(replica, "base"), await generate(replica, "helper", kl=True)]
        return (
            found,
            again,
            refused,
            await replica.models(),
            await replica.status(),
            await replica.tokenize("base", PROMPT),
        )

    found, again, refused, models, status, tokens = run(
        job(adapters={"helper": str(tmp_path / "more")}, template=None), body
    )
    assert found["choices"][0]["text"] == again["choices"][0]["text"] == expected
    assert [r["error"]["code"] for r in refused] == ["model_not_found", "no_base"]
    assert [m["id"] for m in models] == ["helper", found["start"]["adapters"]["helper"]["id"]]
    assert status["serves_base"] is False and list(status["live"]) == ["helper"] and tokens["ids"]
    with pytest.raises(
        ConfigError, match=r"adapters.helper: use_dora: changes weights that all adapters share.*2 adapters"
    ):
        Replica(
            job(adapters={"helper": str(tmp_path / "more"), "other": str(tmp_path / "more")}, model_name_or_path="/no")
        )
