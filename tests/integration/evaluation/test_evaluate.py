"""The evaluation stage on a tiny chain: figures, pairing, files, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import DataConfig, EvaluateConfig
from rlhf_ray.console import Console, NullConsole
from rlhf_ray.data.load import load_rows
from rlhf_ray.data.records import read_rows
from rlhf_ray.errors import ArtifactError, ConfigError, DataError
from rlhf_ray.maths.intervals import mean_interval
from rlhf_ray.maths.standard_errors import standard_error
from rlhf_ray.metrics import read_metrics
from rlhf_ray.stages.start import evaluate
from rlhf_ray.stages.win_rates import distinct_2, pair_counts
from rlhf_ray.storage.run import Run, load_run
from rlhf_ray.storage.run_folder import open_run

pytestmark = pytest.mark.integration

Make = Callable[..., EvaluateConfig]
QUIET = NullConsole()


@pytest.fixture(scope="module")
def done(evaluation: Make, chain: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """base, sft, ppo, and the SFT adapter once more under another name; the baseline is sft."""
    policies = [("base", "base"), ("sft", chain.sft), ("ppo.1", f"{chain.ppo}@1"), ("again", f"{chain.sft}/adapter")]
    config = evaluation(
        tmp_path_factory.mktemp("evaluation") / "run",
        policies=[{"name": name, "policy": policy} for name, policy in policies],
        baseline="sft",
    )
    return evaluate(config, QUIET)


def results(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run.run_dir, "results.jsonl").read_text(encoding="utf-8").splitlines()]


def responses(run: Run, policy: str) -> list[str]:
    return [row["replies"][policy]["output"] for row in results(run)]


def test_figures_are_those_of_the_rows(done: Run) -> None:
    rows = results(done)
    assert len(rows) == 16
    for policy in ("base", "sft", "ppo.1", "again"):
        own = [row["replies"][policy] for row in rows]
        rewards = [response["reward"] for response in own]
        assert done.metrics[f"reward/{policy}"] == pytest.approx(sum(rewards) / 16, abs=1e-6)
        assert done.metrics[f"reward_se/{policy}"] == pytest.approx(standard_error(rewards), abs=1e-6)
        assert done.metrics[f"kl_k1_per_response/{policy}"] == pytest.approx(sum(r["kl"] for r in own) / 16, abs=1e-5)
        assert done.metrics[f"length/{policy}"] == sum(r["length"] for r in own) / 16
        assert done.metrics[f"finished/{policy}"] == sum(r["finished"] for r in own) / 16
        assert done.metrics[f"rows/{policy}"] == 16 and done.metrics[f"dropped/{policy}"] == 0
    gaps = [row["replies"]["ppo.1"]["reward"] - row["replies"]["sft"]["reward"] for row in rows]
    won = [2 if gap > 0 else 1 if gap < 0 else 0 for gap in gaps]
    assert [row["replies"]["ppo.1"]["preference"] for row in rows] == won
    assert done.metrics["win_rate/ppo.1"] == pytest.approx(sum(code == 2 for code in won) / 16)
    assert done.metrics["score_difference/ppo.1"] == pytest.approx(sum(gaps) / 16, abs=1e-6)
    assert done.metrics["score_difference_se/ppo.1"] == pytest.approx(standard_error(gaps), abs=1e-6)


def test_the_reference_is_at_a_kl_of_exactly_0_and_others_are_not(done: Run) -> None:
    """F14, F15, F38: the same forward pass for both sides leaves no floor."""
    assert done.metrics["kl_k1_per_response/sft"] == 0.0 == done.metrics["kl_k3_per_response/sft"]
    assert done.metrics["kl_k3_per_response/base"] > 0.1
    assert done.metrics["kl_k3_per_response/ppo.1"] > 1e-3


def test_equal_policies_draw_on_every_prompt(done: Run) -> None:
    """All policies share the random numbers, so the same weights give the same replies."""
    assert responses(done, "again") == responses(done, "sft")
    assert done.metrics["draws/again"] == 1.0 and done.metrics["win_rate/again"] == 0.5
    assert done.metrics["kl_k1_per_response/again"] == 0.0
    assert done.metrics["score_difference/again"] == pytest.approx(0.0, abs=1e-6)
    assert done.metrics["win_rate_length_controlled/again"] == 0.5
    assert responses(done, "base") != responses(done, "sft")


def test_a_judge_that_was_maximised_is_told(evaluation: Any, chain: Any, tmp_path: Path, console: Any) -> None:
    """Wins by it are what over-optimisation looks like; another judge, or a policy that maximised nothing, is not told."""
    policies = [{"name": "base", "policy": "base"}, {"name": "ppo.1", "policy": chain.ppo}]
    evaluate(evaluation(tmp_path / "a", policies=policies), console)
    (told,) = [line for line in console.warnings if "which judges it here" in line]
    assert told.startswith("ppo.1 maximised reward")
    rule = tmp_path / "length.py"
    rule.write_text("def score(prompts, completions):\n    return [float(len(c)) for c in completions]\n")
    quiet = type(console)()
    evaluate(
        evaluation(tmp_path / "b", policies=policies, rewards=[{"name": "length", "function": f"{rule}:score"}]), quiet
    )
    assert not any("maximised" in line for line in quiet.warnings)


def test_only_held_out_prompts_are_asked(done: Run, chain: Any) -> None:
    """F29: no prompt that a stage trains on."""
    rows = load_rows(DataConfig(train=(chain.prompts,), held_out_fraction=0.4), "prompt")
    asked = {(row["instruction"], row["input"]) for row in results(done)}
    assert asked == {(row.prompt.text, row.prompt.input) for row in rows.held_out}
    assert asked.isdisjoint({(row.prompt.text, row.prompt.input) for row in rows.train})


def test_the_folder_holds_what_it_says(done: Run, chain: Any) -> None:
    run = open_run(done.run_dir)  # verifies every recorded hash
    assert load_run(done.run_dir) == done
    manifest = run.manifest()
    assert (manifest["stage"], manifest["status"], manifest["template"]["name"]) == ("evaluate", "done", "alpaca_short")
    assert [p["role"] for p in manifest["parents"]] == [
        "policy:base",
        "policy:sft",
        "policy:ppo.1",
        "policy:again",
        "reward:reward",
    ]
    assert manifest["parents"][1]["sha256"] == manifest["parents"][3]["sha256"] != manifest["parents"][2]["sha256"]
    for name in done.artifacts.values():
        assert (run.path / name).is_file()
    assert {"results.jsonl", "comparisons.json", "pairs_base.json", "metrics.jsonl"} <= manifest["files"].keys()
    assert read_metrics(run.path / "metrics.jsonl") == [{"step": 0, **done.metrics}]
    samples = read_metrics(run.path / "samples.jsonl")
    assert [s["policy"] for s in samples[:4]] == ["base", "sft", "ppo.1", "again"]
    assert samples[0]["prompt"].startswith("### Instruction:") and isinstance(samples[0]["reply"], str)
    assert "ppo.1" in (run.path / "report.html").read_text(encoding="utf-8")


def test_pairwise_files_are_in_the_ancestors_form(done: Run) -> None:
    """Parity P18: rows {instruction, input, output_1 = reference, output_2 = model}, readable as preference data."""
    file = Path(done.run_dir, "pairs_ppo.1.json")
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert [set(row) for row in rows] == [{"instruction", "input", "output_1", "output_2", "preference"}] * 16
    assert [row["output_1"] for row in rows] == responses(done, "sft")
    assert [row["output_2"] for row in rows] == responses(done, "ppo.1")
    read = read_rows(DataConfig(train=(str(file),), on_bad_row="skip"), "preference")  # a random model also writes NUL
    nul = sum("\0" in row["output_1"] + row["output_2"] for row in rows)
    assert read.files[0].format == "alpaca_farm" and len(read.rows) == 16 - nul and nul < 4 and "\0" not in str(rows[0])
    first = results(done)[0]["replies"]
    better = max(("sft", "ppo.1"), key=lambda name: first[name]["reward"])
    assert read.rows[0].chosen == first[better]["output"]
    assert not Path(done.run_dir, "pairs_sft.json").exists()
    counts = json.loads(Path(done.run_dir, "comparisons.json").read_text())["policies"]["ppo.1"]
    assert counts["wins"] + counts["losses"] + counts["draws"] == counts["n_judged"] == counts["n_total"] == 16
    gaps = [row["replies"]["ppo.1"]["reward"] - row["replies"]["sft"]["reward"] for row in results(done)]
    interval = mean_interval(gaps, 0.95, 0)
    told = counts["score_difference_interval"]
    assert (told["low"], told["high"], told["by"]) == (
        pytest.approx(interval.low, rel=1e-5),
        pytest.approx(interval.high, rel=1e-5),
        interval.by,
    )
    assert done.metrics["score_difference_low/ppo.1"] == told["low"]


def test_diversity_is_compared_at_equal_length(done: Run) -> None:
    pairs = {name: pair_counts(responses(done, name)) for name in ("base", "sft", "ppo.1", "again")}
    drawn = min(counts.total() for counts in pairs.values())
    for name, counts in pairs.items():
        assert done.metrics[f"distinct_2_pairs/{name}"] == drawn < 1_000
        assert done.metrics[f"distinct_2/{name}"] == pytest.approx(distinct_2(counts, drawn))


def test_the_same_job_gives_the_same_replies_and_another_seed_others(
    done: Run, evaluation: Make, tmp_path: Path
) -> None:
    once, twice = (evaluate(evaluation(tmp_path / name), QUIET) for name in ("a", "b"))
    assert once.metrics == twice.metrics and results(once) == results(twice)
    assert responses(once, "sft") == responses(done, "sft")  # and they do not depend on who else is compared
    other = evaluate(evaluation(tmp_path / "c", seed=1), QUIET)
    assert responses(other, "sft") != responses(once, "sft")


def test_greedy_decoding_does_not_depend_on_the_seed(evaluation: Make, tmp_path: Path, console: Any) -> None:
    greedy = {"sampling": {"do_sample": False}}
    once = evaluate(evaluation(tmp_path / "a", **greedy), console)
    other = evaluate(evaluation(tmp_path / "b", seed=5, **greedy), QUIET)
    assert responses(once, "sft") == responses(other, "sft")
    assert "no KL can be estimated" in str(console.warnings)
    assert not any(name.startswith("kl_") for name in once.metrics), "a mean of k1 over greedy replies is not a KL"
    assert {reply["kl"] for row in results(once) for reply in row["replies"].values()} == {None}


def test_a_finished_evaluation_is_returned_and_another_job_is_not_answered_by_it(
    evaluation: Make, tmp_path: Path, console: Any
) -> None:
    first = evaluate(evaluation(tmp_path / "run"), QUIET)
    before = (tmp_path / "run" / "results.jsonl").stat().st_mtime_ns
    again = evaluate(evaluation(tmp_path / "run", resume="auto"), console)
    assert again == first and (tmp_path / "run" / "results.jsonl").stat().st_mtime_ns == before
    assert "nothing to do" in console.text
    with pytest.raises(ConfigError, match="already holds a run"):
        evaluate(evaluation(tmp_path / "run"), QUIET)
    with pytest.raises(ConfigError, match="another value"):
        evaluate(evaluation(tmp_path / "run", resume="auto", response_length=5), QUIET)


def test_an_interrupted_evaluation_starts_again(evaluation: Make, tmp_path: Path) -> None:
    class Stops(NullConsole):
        def progress(self, *args: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(evaluation(tmp_path / "run"), Stops())
    assert load_run(tmp_path / "run").status == "running"
    found = evaluate(evaluation(tmp_path / "run", resume="auto"), QUIET)
    assert found.status == "done"
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1
    assert len(read_metrics(tmp_path / "run" / "samples.jsonl")) == 32


def test_a_reward_called_true_reward_is_the_tasks_own_rule(evaluation: Make, tmp_path: Path) -> None:
    """The demo's contract: true_reward/<policy> with its standard error. Weight 0 is watched, not summed."""
    rule = tmp_path / "rule.py"
    rule.write_text(
        "def score(prompts, completions, instruction, **columns):\n"
        "    return [len(c) + len(i) / 100 for c, i in zip(completions, instruction)]\n"
    )
    rewards = [{"name": "true_reward", "function": f"{rule}:score", "weight": 0.0}]
    run = evaluate(evaluation(tmp_path / "run", rewards=rewards), QUIET)
    expected = [len(row["replies"]["sft"]["output"]) + len(row["instruction"]) / 100 for row in results(run)]
    assert run.metrics["true_reward/sft"] == pytest.approx(sum(expected) / 16, rel=1e-6)
    assert run.metrics["true_reward_se/sft"] == pytest.approx(standard_error(expected), rel=1e-5)
    assert "win_rate/sft" in run.metrics and "reward/sft" not in run.metrics
    parents = open_run(run.run_dir).manifest()["parents"]
    assert parents[-1]["role"] == "reward:true_reward" and len(parents[-1]["sha256"]) == 64


def test_several_rewards_are_told_apart_and_the_judge_decides(evaluation: Make, chain: Any, tmp_path: Path) -> None:
    rule = tmp_path / "rule.py"
    rule.write_text("def cost(prompts, completions):\n    return [float(len(c)) for c in completions]\n")
    rewards = [
        {"name": "model", "run": chain.reward, "weight": 2.0},
        {"name": "cost", "function": f"{rule}:cost", "weight": -1.0},
    ]
    run = evaluate(evaluation(tmp_path / "run", rewards=rewards, judge="cost"), QUIET)
    m = run.metrics
    assert m["reward/sft"] == pytest.approx(2 * m["reward/model/sft"] - m["reward/cost/sft"], rel=1e-5)
    row = results(run)[0]["replies"]
    lengths = [len(row[name]["output"]) for name in ("base", "sft")]
    assert row["sft"]["preference"] == (0 if lengths[0] == lengths[1] else 2 if lengths[1] < lengths[0] else 1)
    gaps = [len(r["replies"]["sft"]["output"]) - len(r["replies"]["base"]["output"]) for r in results(run)]
    assert m["score_difference/sft"] == pytest.approx(-sum(gaps) / 16)


def test_a_reward_that_applies_to_some_replies_or_to_none(evaluation: Make, tmp_path: Path) -> None:
    """None: a figure is of the replies that have one, and is left out where there is none; files say null."""
    rule = tmp_path / "rule.py"
    rule.write_text(
        "def some(prompts, completions, instruction, **columns):\n"
        "    return [float(len(i)) if i.startswith('Name') else None for i in instruction]\n"
        "def never(prompts, completions, **columns):\n    return [None] * len(prompts)\n"
    )
    rewards = [{"name": name, "function": f"{rule}:{name}"} for name in ("some", "never")]
    run = evaluate(evaluation(tmp_path / "run", rewards=rewards), QUIET)
    known = [float(len(row["instruction"])) for row in results(run) if row["instruction"].startswith("Name")]
    assert 1 < len(known) < 16
    assert run.metrics["reward/sft"] == run.metrics["reward/some/sft"] == pytest.approx(sum(known) / len(known))
    assert run.metrics["reward_se/sft"] == pytest.approx(standard_error(known), rel=1e-5)
    assert "reward/never/sft" not in run.metrics
    for row in results(run):
        has_one = row["instruction"].startswith("Name")
        said = row["replies"]["sft"]
        assert (said["reward"] is None, said["rewards"]["some"] is None) == (not has_one, not has_one)
        assert said["rewards"]["never"] is None
    silent = evaluate(evaluation(tmp_path / "silent", rewards=rewards[1:]), QUIET)
    assert (
        not any(name.startswith(("reward", "win_rate")) for name in silent.metrics) and silent.metrics["length/sft"] > 0
    )
    assert "NaN" not in "".join(path.read_text() for path in Path(silent.run_dir).glob("*.json*"))


def test_without_rewards_nobody_wins(evaluation: Make, tmp_path: Path) -> None:
    run = evaluate(evaluation(tmp_path / "run", rewards=[]), QUIET)
    assert not any(name.startswith(("reward", "win_rate", "draws")) for name in run.metrics)
    assert run.metrics["kl_k1_per_response/base"] == 0.0 and run.metrics["length/sft"] > 0
    assert "preference" not in json.loads(Path(run.run_dir, "pairs_sft.json").read_text())[0]


def test_a_merged_checkpoint_is_a_policy_like_its_adapter(evaluation: Make, chain: Any, tmp_path: Path) -> None:
    from rlhf_ray.models.merge import merge_run

    merged = merge_run(chain.sft, tmp_path / "merged")
    policies = [{"name": "sft", "policy": chain.sft}, {"name": "merged", "policy": str(merged)}]
    run = evaluate(evaluation(tmp_path / "run", policies=policies), QUIET)
    assert abs(run.metrics["kl_k1_per_response/merged"]) < 1e-3
    same = sum(a == b for a, b in zip(responses(run, "sft"), responses(run, "merged")))
    assert same >= 14  # rounding may flip a token of a reply
    assert any("2 loaded" in line for line in _header(evaluation(tmp_path / "again", policies=policies)))


def _header(config: EvaluateConfig) -> list[str]:
    class Headers(Console):
        lines: list[str] = []  # noqa: RUF012

        def emit(self, event: dict[str, Any]) -> None:
            if event["kind"] == "header":
                self.lines += event["lines"]

    console = Headers()
    evaluate(config, console)
    return console.lines


def test_the_base_itself_named_by_its_path_is_not_loaded_twice(evaluation: Make, chain: Any, tmp_path: Path) -> None:
    policies = [{"name": "base", "policy": "base"}, {"name": "path", "policy": chain.base}]
    config = evaluation(tmp_path / "run", policies=policies, rewards=[])
    assert any("1 loaded" in line for line in _header(config))
    assert responses(load_run(tmp_path / "run"), "path") == responses(load_run(tmp_path / "run"), "base")


def test_prompts_that_are_too_long_are_dropped_and_told(
    evaluation: Make, chain: Any, tmp_path: Path, console: Any
) -> None:
    file = tmp_path / "prompts.jsonl"
    long = {"instruction": "Name " + "the oak " * 30, "input": ""}
    file.write_text("".join(json.dumps(row) + "\n" for row in [{"instruction": "Hi.", "input": ""}, long]))
    data = {"train": chain.prompts, "eval": str(file)}
    run = evaluate(evaluation(tmp_path / "run", data=data), console)
    assert run.metrics["rows/sft"] == 1 and run.metrics["dropped/sft"] == 1
    counts = json.loads(Path(run.run_dir, "comparisons.json").read_text())["policies"]["sft"]
    assert (counts["n_total"], counts["n_judged"], counts["n_dropped"]) == (2, 1, 1)
    assert "1 dropped: over 128-12" in str(console.events)
    with pytest.raises(DataError, match="tokens"):
        evaluate(evaluation(tmp_path / "stop", data={**data, "too_long": "stop"}), QUIET)
    file.write_text(json.dumps(long) + "\n")
    with pytest.raises(DataError, match="no prompt can be answered"):
        evaluate(evaluation(tmp_path / "none", data=data), QUIET)


def test_eval_max_rows_limits_the_prompts(evaluation: Make, chain: Any, tmp_path: Path) -> None:
    data = {"train": chain.prompts, "held_out_fraction": 0.4, "eval_max_rows": 5}
    run = evaluate(evaluation(tmp_path / "run", data=data), QUIET)
    assert run.metrics["rows/sft"] == 5


def test_nothing_held_out_is_refused_before_anything_is_loaded(evaluation: Make, chain: Any, tmp_path: Path) -> None:
    data = {"train": chain.prompts, "held_out_fraction": 0.0}
    with pytest.raises(ConfigError, match="no prompt is held out"):
        evaluate(evaluation(tmp_path / "a", data=data, model_name_or_path="/nowhere"), QUIET)
    with pytest.raises(DataError, match=r"none of 40 prompts falls into data\.held_out_fraction"):
        evaluate(evaluation(tmp_path / "b", data={**data, "held_out_fraction": 1e-9}), QUIET)


@pytest.mark.parametrize("policy", ["./nowhere", "runs/none/at/all", "{sft}@999"])
def test_a_policy_that_is_not_there(evaluation: Make, chain: Any, tmp_path: Path, policy: str) -> None:
    expected = ArtifactError if "@" in policy else ConfigError
    with pytest.raises(expected, match=r"no such folder|no checkpoint of step 999; expected one of"):
        evaluate(evaluation(tmp_path / "run", policies=[{"name": "x", "policy": policy.format(sft=chain.sft)}]), QUIET)


def test_an_adapter_of_another_base_is_refused(
    evaluation: Make, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """Its shapes fit, its weights do not: it would answer nonsense without an error."""
    other = str(tiny_llama(context=128, seed=7))
    with pytest.raises(ArtifactError, match="another base"):
        evaluate(evaluation(tmp_path / "run", model_name_or_path=other), QUIET)


def test_another_template_is_refused_and_leaves_no_folder(evaluation: Make, tmp_path: Path) -> None:
    """F34. The job is mended and started again under the same name."""
    with pytest.raises(ArtifactError, match=r"another prompt template.*fix: set template=alpaca_short"):
        evaluate(evaluation(tmp_path / "run", template="vigogne"), QUIET)
    assert not (tmp_path / "run").exists()


def test_a_reward_run_is_no_policy_and_a_policy_no_reward(evaluation: Make, chain: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is a reward model"):
        evaluate(evaluation(tmp_path / "a", policies=[{"name": "x", "policy": chain.reward}]), QUIET)
    with pytest.raises(ArtifactError, match="is not a reward run"):
        evaluate(evaluation(tmp_path / "b", rewards=[{"run": chain.sft}]), QUIET)


def test_global_settings_are_as_they_were(evaluation: Make, tmp_path: Path) -> None:
    """F23: evaluation once changed TF32 for everything after it."""
    before = (torch.backends.cuda.matmul.allow_tf32, torch.is_grad_enabled(), torch.get_default_dtype())
    evaluate(evaluation(tmp_path / "run"), QUIET)
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.is_grad_enabled(), torch.get_default_dtype())


def test_the_console_gets_the_table_and_three_prompts_side_by_side(
    evaluation: Make, tmp_path: Path, console: Any
) -> None:
    evaluate(evaluation(tmp_path / "run"), console)
    tables = [event for event in console.events if event["kind"] == "table"]
    assert len(tables) == 4
    assert tables[0]["columns"][:3] == ["policy", "reward", "win rate"]
    assert [row[0] for row in tables[0]["rows"]] == [row[0] for row in tables[1]["rows"]] == ["base", "sft"]
    assert "sft against base by reward: " in console.text and "at equal length" in console.text


@pytest.mark.slow
def test_two_workers_give_the_same_evaluation_as_one_process(
    evaluation: Make, chain: Any, tmp_path: Path, four_cpus: Any
) -> None:
    """Chunks belong to ranks in turn, and a chunk's replies do not depend on who samples it."""
    alone = evaluate(evaluation(tmp_path / "alone"), QUIET)
    group = evaluate(evaluation(tmp_path / "group", learner={"num_workers": 2, "num_threads": 1}), QUIET)
    assert results(group) == results(alone)
    assert group.metrics == alone.metrics and open_run(group.run_dir).manifest()["world_size"] == 2
