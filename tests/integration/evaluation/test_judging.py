"""Several judges of several kinds of policies: loaded, served, from a file, best-of-n. The endpoints are scripted, on loopback."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import EvaluateConfig, PPOConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.errors import ConfigError, DataError, Interrupted
from rlhf_ray.maths.stats import cohen_kappa
from rlhf_ray.plan.job_plan import plan as plan_of
from rlhf_ray.rewards import http_client
from rlhf_ray.stages.start import evaluate, ppo
from rlhf_ray.storage.run_folder import open_run
from tests.servers import Reply, ScriptedServer, serving

pytestmark = pytest.mark.integration

Make = Callable[..., EvaluateConfig]
QUIET = NullConsole()
PATH = "/v1/chat/completions"
LONGER = "def longer(prompts, completions):\n    return [float(len(c)) for c in completions]\n"


def said(text: str, reason: str = "stop") -> dict[str, Any]:
    usage = {"prompt_tokens": 50, "completion_tokens": 5}
    return {"choices": [{"message": {"content": text}, "finish_reason": reason}], "usage": usage}


def longer(body: Any) -> dict[str, Any]:
    """Knows the right answer: the longer reply; of one reply, its length up to 10."""
    asked = body["messages"][-1]["content"]
    seen = [len(text) for text in re.findall(r"<reply\w*>\n(.*?)\n</reply", asked, re.DOTALL)]
    if len(seen) == 1:
        return said(f"SCORE: {min(seen[0], 10)}")
    return said(f"VERDICT: {'TIE' if seen[0] == seen[1] else 1 if seen[0] > seen[1] else 2}")


def judge(server: ScriptedServer, cache: Path, **fields: Any) -> dict[str, Any]:
    base = server.url.removesuffix("/chat/completions")
    return {"base_url": base, "model": "judge", "mode": "pairwise", "cache_dir": str(cache), "max_retries": 0, **fields}


def rows(run: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run.run_dir) / "results.jsonl").read_text().splitlines()]


def comparisons(run: Any) -> dict[str, Any]:
    return dict(json.loads((Path(run.run_dir) / "comparisons.json").read_text()))


@pytest.fixture
def rule(tmp_path: Path) -> str:
    path = tmp_path / "rule.py"
    path.write_text(LONGER)
    return f"{path}:longer"


def test_judges_side_by_side(evaluation: Make, chain: Any, rule: str, tmp_path: Path) -> None:
    """A Python rule, a reward run, and an LLM judge that knows the rule: the first decides, the others are told beside it."""
    policies = [{"name": n, "policy": p} for n, p in (("base", "base"), ("sft", chain.sft), ("ppo", chain.ppo))]
    with serving(longer, path=PATH) as server:
        rewards = [
            {"name": "rule", "function": rule},
            {"name": "rm", "run": chain.reward},
            {"name": "gpt", "llm": judge(server, tmp_path / "cache")},
        ]
        config = evaluation(tmp_path / "run", policies=policies, rewards=rewards, judge=["rule", "rm", "gpt"])
        run = evaluate(config, QUIET)
    found, lines = comparisons(run), rows(run)
    assert (found["judge"], list(found["judges"])) == ("rule", ["rule", "rm", "gpt"])
    assert found["judges"]["gpt"]["policies"]["sft"]["win_rate"] == found["policies"]["sft"]["win_rate"]
    assert found["judges"]["gpt"]["policies"]["sft"]["score_difference"] is None  # a judge of pairs has no scores
    assert found["judges"]["gpt"] | {"policies": 0} == {
        "policies": 0, "refused": 0, "unparsable": 0, "flipped": 0, "cached": 0, "requests": len(server.asked),
        "prompt_tokens": 50 * len(server.asked), "completion_tokens": 5 * len(server.asked),
    }  # fmt: skip
    agreed = {(a["first"], a["second"]): a for a in found["agreement"]}
    assert agreed["rule", "gpt"]["agreement"] == 1.0 and agreed["rule", "gpt"]["n"] == 32
    codes = [[r["replies"][p]["preferences"][j] for p in ("sft", "ppo") for r in lines] for j in ("rule", "rm")]
    assert agreed["rule", "rm"]["kappa"] == pytest.approx(cohen_kappa(*codes))
    assert run.metrics["win_rate_by/gpt/ppo"] == run.metrics["win_rate/ppo"] != run.metrics["win_rate_by/rm/ppo"]
    assert all(row["replies"]["base"]["preference"] is None for row in lines)
    (pair,) = found["between"]
    wins = {p: [{0: 0.5, 1: 0.0, 2: 1.0}[r["replies"][p]["preference"]] for r in lines] for p in ("sft", "ppo")}
    assert (pair["first"], pair["second"], pair["n"]) == ("sft", "ppo", 16)
    assert pair["difference"] == pytest.approx(100 * (sum(wins["ppo"]) - sum(wins["sft"])) / 16)
    decoding = open_run(run.run_dir).manifest()["decoding"]
    assert decoding == found["decoding"] and decoding["sft"]["temperature"] == 1.0 and decoding["sft"]["seed"] == 0
    assert "gpt" not in lines[0]["replies"]["sft"]["rewards"] and "reward/gpt/sft" not in run.metrics


def test_a_judge_that_goes_away_is_resumed_without_asking_again(
    evaluation: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "FIRST_PAUSE_S", 0.01)
    with serving(longer, path=PATH) as server:

        def config(name: str, cache: str, **fields: Any) -> EvaluateConfig:
            llm = judge(server, tmp_path / cache, concurrency=1, max_total_tokens=10_000)
            return evaluation(tmp_path / name, rewards=[{"name": "gpt", "llm": llm}], **fields)

        whole = evaluate(config("whole", "one"), QUIET)
        needed = len(server.asked)
        server.answer = lambda body: longer(body) if len(server.asked) <= needed + 7 else Reply({}, 503)
        with pytest.raises(Interrupted, match=r"judge gpt .*: answered with status 503"):
            evaluate(config("cut", "two"), QUIET)
        server.answer = longer
        before = len(server.asked)
        resumed = evaluate(config("cut", "two", resume="auto"), QUIET)
        assert before - needed == 8 and len(server.asked) - before == needed - 7
        assert evaluate(config("again", "two"), QUIET).metrics == resumed.metrics
        assert len(server.asked) == before + needed - 7  # another run, nothing to pay
    assert resumed.metrics == whole.metrics
    first, second = comparisons(whole), comparisons(resumed)
    assert first["judges"]["gpt"]["requests"] == needed == second["judges"]["gpt"]["requests"]
    assert first["policies"] == second["policies"] and second["judges"]["gpt"]["cached"] == 7


def test_policies_that_are_not_loaded_and_the_best_of_four(
    evaluation: Make, chain: Any, rule: str, tmp_path: Path, console: Any
) -> None:
    """A file of outputs that lacks two prompts, an endpoint, and best-of-4 of the base under the reward run: one table, on the
    prompts that all of them answer."""
    asked = [json.loads(line) for line in Path(chain.prompts).read_text().splitlines()]
    held = rows(evaluate(evaluation(tmp_path / "first"), QUIET))
    known = {(r["instruction"], r["input"]) for r in held}
    left_out = sorted(known)[:2]
    file = tmp_path / "outputs.json"
    outputs = [r | {"output": f"a {r['instruction'][-5:]}", "generator": "x"} for r in asked]
    file.write_text(json.dumps([r for r in outputs if (r["instruction"], r["input"]) not in left_out]))
    with serving(lambda body: said("so it is", "length"), path=PATH) as server:
        endpoint = {"base_url": server.url.removesuffix("/chat/completions"), "model": "far", "concurrency": 3}
        policies = [
            {"name": "base", "policy": "base"},
            {"name": "bon", "policy": "base", "best_of": 4, "best_of_reward": "rm"},
            {"name": "file", "outputs": str(file)},
            {"name": "far", "endpoint": endpoint},
        ]
        rewards = [{"name": "rm", "run": chain.reward}, {"name": "rule", "function": rule}]
        run = evaluate(
            evaluation(tmp_path / "run", policies=policies, rewards=rewards, judge="rule", sampling={"top_p": 1.0}),
            console,
        )
        requests = len(server.asked)
        evaluate(evaluation(tmp_path / "run", policies=policies, rewards=rewards, judge="rule", resume="auto"), QUIET)
        assert len(server.asked) == requests == 14
    m, lines = run.metrics, rows(run)
    assert len(lines) == 14 and m["rows/file"] == 14 and m["dropped/base"] == 2
    assert comparisons(run)["policies"]["file"]["n_dropped"] == 2
    assert not {(r["instruction"], r["input"]) for r in lines} & set(left_out)
    for row in lines:
        replies = row["replies"]
        assert replies["file"]["output"] == f"a {row['instruction'][-5:]}" and replies["far"]["output"] == "so it is"
        assert (
            replies["bon"]["rewards"]["rm"] >= replies["base"]["rewards"]["rm"]
        )  # the base's reply is one of the four
        assert replies["file"]["kl"] is None and replies["bon"]["kl"] is None and replies["base"]["kl"] == 0.0
        assert replies["file"]["rewards"]["rule"] == len(replies["file"]["output"])
        assert (replies["file"]["finished"], replies["far"]["finished"]) == (True, False)
    assert m["reward/rm/bon"] > m["reward/rm/base"] and m["best_of/bon"] == 4.0
    assert m["kl_bound/bon"] == pytest.approx(0.636294, abs=1e-6)
    assert not [n for n in m if n.startswith("kl_k1") and n.endswith(("/bon", "/file", "/far"))]
    body = server.asked[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("far", 12, 1.0)
    assert len({body["seed"] for body in server.asked}) == 14
    assert any("2 of 16 prompts have no reply in file's file" in w for w in console.warnings)
    parents = {p["role"]: p for p in open_run(run.run_dir).manifest()["parents"]}
    assert len(parents["policy:file"]["sha256"]) == 64
    decoding = comparisons(run)["decoding"]
    assert (
        decoding["file"] == {"outputs": str(file)}
        and decoding["bon"]["best_of"] == 4
        and decoding["far"]["model"] == "far"
    )


def test_two_files_of_outputs_need_no_policy_of_ours(evaluation: Make, chain: Any, rule: str, tmp_path: Path) -> None:
    """As AlpacaFarm compares: a reference's file and a system's. The prompts may come from one of them."""
    asked = [json.loads(line) for line in Path(chain.prompts).read_text().splitlines()]
    for name, text in (("davinci", "short"), ("ppo", "long enough")):
        (tmp_path / f"{name}.json").write_text(json.dumps([row | {"output": text} for row in asked]))
    policies = [{"name": name, "outputs": str(tmp_path / f"{name}.json")} for name in ("davinci", "ppo")]
    rewards = [{"name": "rule", "function": rule}, {"name": "rm", "run": chain.reward}]
    config = evaluation(
        tmp_path / "run",
        policies=policies,
        rewards=rewards,
        judge="rule",
        data={"train": chain.prompts, "eval": policies[0]["outputs"]},
    )
    run = evaluate(config, QUIET)
    assert run.metrics["win_rate/ppo"] == 1.0 and run.metrics["rows/ppo"] == len(asked)
    assert run.metrics["length/ppo"] > run.metrics["length/davinci"] and "reward/rm/ppo" in run.metrics
    assert not any(name.startswith("kl_") for name in run.metrics)
    assert "sampling" not in plan_of(config, "cpu").stages[0].processes[0].phases


def test_an_empty_reply_loses_and_only_prompts_that_were_come_to_are_dropped(
    evaluation: Make, chain: Any, rule: str, tmp_path: Path
) -> None:
    """An empty reply ended the evaluation; eval_max_rows counted what is beyond it as dropped."""
    asked = [json.loads(line) for line in Path(chain.prompts).read_text().splitlines()]
    file = tmp_path / "outputs.json"
    file.write_text(
        json.dumps([row | {"output": "" if i == 2 else "long"} for i, row in enumerate(asked[:12]) if i != 1])
    )
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps([row | {"output": "no"} for row in asked]))
    config = evaluation(
        tmp_path / "run",
        policies=[{"name": "base", "outputs": str(whole)}, {"name": "file", "outputs": str(file)}],
        rewards=[{"name": "rule", "function": rule}],
        data={"train": chain.prompts, "eval": chain.prompts, "eval_max_rows": 4},
    )
    run = evaluate(config, QUIET)
    counts = comparisons(run)["policies"]["file"]
    assert (counts["n_total"], counts["n_judged"], counts["n_dropped"]) == (5, 4, 1)
    assert (run.metrics["win_rate/file"], run.metrics["dropped/file"]) == (0.75, 1.0)
    assert [row["replies"]["file"]["output"] for row in rows(run)] == ["long", "", "long", "long"]
    file.write_text(json.dumps([row | {"output": None} for row in asked]))
    with pytest.raises(DataError, match="'output'"):
        evaluate(config.model_copy(update={"output_dir": str(tmp_path / "again")}), QUIET)
    file.write_text(json.dumps(asked))
    with pytest.raises(DataError, match="has prompts and no replies"):
        evaluate(config.model_copy(update={"output_dir": str(tmp_path / "again")}), QUIET)


def test_best_of_n_by_its_own_judge_is_told(evaluation: Make, tmp_path: Path, console: Any) -> None:
    policies = [{"name": "base", "policy": "base"}, {"name": "bon", "policy": "base", "best_of": 2}]
    evaluate(evaluation(tmp_path / "run", policies=policies), console)
    assert any("bon is the best of 2 under reward, which judges it here" in w for w in console.warnings)


def test_a_file_that_answers_nothing_is_refused(evaluation: Make, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(json.dumps([{"instruction": "Something else.", "input": "", "output": "x"}]))
    policies = [{"name": "base", "policy": "base"}, {"name": "file", "outputs": str(file)}]
    with pytest.raises(ConfigError, match=r"policies.file.outputs: has no reply to any prompt of the evaluation"):
        evaluate(evaluation(tmp_path / "run", policies=policies), QUIET)
    assert not (tmp_path / "run").exists()


def test_ppo_is_watched_by_a_language_model(chain: Any, tmp_path: Path) -> None:
    """A pointwise judge of weight 0: its scores choose the best step, what it cannot read is counted, and a resumed or repeated run
    does not ask again."""
    with serving(longer, path=PATH) as server:
        llm = judge(server, tmp_path / "cache", mode="pointwise", verdict_retries=0)

        def job(name: str) -> PPOConfig:
            values = {
                **chain.job,
                "output_dir": str(tmp_path / name),
                "sft": chain.sft,
                "data": {"train": chain.prompts, "held_out_fraction": 0.4},
                "rewards": [{"name": "rm", "run": chain.reward}, {"name": "gpt", "llm": llm, "weight": 0.0}],
                "watch": "gpt",
                "rollout_batch_size": 8,
                "per_device_train_batch_size": 8,
                "num_mini_batches": 1,
                "response_length": 8,
                "max_steps": 1,
            }
            return PPOConfig(**values)

        refusing = iter([said("I would rather not say.")])
        server.answer = lambda body: next(refusing, None) or longer(body)
        run = ppo(job("one"), QUIET)
        asked = len(server.asked)
        again = ppo(job("two"), QUIET)
        assert len(server.asked) == asked
    assert 0 < run.metrics["eval/reward/gpt"] <= 10 and again.metrics["reward/gpt"] == run.metrics["reward/gpt"]
    history = [json.loads(line) for line in (tmp_path / "one/metrics.jsonl").read_text().splitlines()]
    names = ("eval/reward/gpt/unparsable", "reward/gpt/unparsable")
    assert any(line.get(name, 0) > 0 for line in history for name in names)
    assert not any(line.get("reward/gpt/refused", 0) for line in history)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"judge": ["reward", "reward"]}, "judge: names repeat: reward, reward"),
        ({"judge": []}, "judge"),
        ({"judge": "nobody"}, "judge: 'nobody' is not among reward"),
        ({"policies": [{"name": "a"}]}, "a policy needs exactly one of policy, endpoint, outputs"),
        ({"policies": [{"name": "a", "outputs": "x.json", "best_of": 2}]}, "a file of replies is not sampled from"),
        ({"policies": [{"name": "a", "policy": "base", "best_of_reward": "reward"}]}, "has no effect with best_of 1"),
        (
            {"policies": [{"name": "a", "policy": "base", "best_of": 2}], "rewards": []},
            "expected a reward that scores single",
        ),
        (
            {"policies": [{"name": "a", "outputs": "x"}], "reference": "a"},
            "reference: a is no model that is loaded here",
        ),
        (
            {
                "rewards": [
                    {"function": "f:s"},
                    {"name": "g", "llm": {"base_url": "http://h", "model": "m", "mode": "pairwise"}},
                ]
            },
            "judge: g compares pairs, and judges nothing",
        ),
    ],
)
def test_what_is_refused(evaluation: Make, tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    from rlhf_ray.config.load import load_dict

    values = evaluation(tmp_path / "run").model_dump(mode="json", exclude_unset=True) | fields
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_dict(EvaluateConfig, values, "job.yaml")
