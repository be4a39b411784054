"""`score`: the reward of texts, by the path that training and PPO use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.cli import main
from rlhf_ray.config import RewardSource
from rlhf_ray.errors import ArtifactError, ConfigError, DataError
from rlhf_ray.maths.stats import wilson_interval
from rlhf_ray.rewards import http_client
from rlhf_ray.stages.score import pair_verdict, score
from tests.servers import Reply, serving

pytestmark = pytest.mark.integration

PROMPT = "### Instruction:\nName the oak.\n\n### Response:\n"


def grade(console: Any, *, run: str | None = None, function: str | None = None, **options: Any) -> list[dict[str, Any]]:
    return score(source=RewardSource(run=run, function=function), num_threads=1, console=console, **options)


def by_hand(chain: Any, texts: list[str], eos: bool = True) -> list[float]:
    """Scores of transformers and PEFT alone, one unpadded sequence at a time."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chain.base)
    model = AutoModelForSequenceClassification.from_pretrained(chain.base, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = 0
    model = PeftModel.from_pretrained(model, f"{chain.reward}/adapter").eval()
    ids = [tokenizer(text).input_ids + ([tokenizer.eos_token_id] if eos else []) for text in texts]
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([row])).logits) for row in ids]


def test_a_reward_is_what_the_plain_libraries_compute(chain: Any, console: Any) -> None:
    """F10, F11: eos is part of what is scored, and padding is not."""
    (row,) = grade(console, run=chain.reward, prompt="Name the oak.", completion="a tall tree")
    assert list(row) == ["prompt", "completion", "reward"]
    with_eos, without = (by_hand(chain, [PROMPT + "a tall tree"], eos)[0] for eos in (True, False))
    assert row["reward"] == pytest.approx(with_eos, abs=1e-4)
    assert abs(with_eos - without) > 1e-2
    assert "reproduces the scores" in console.text


def test_replies_of_a_file_score_alone_as_in_a_batch(chain: Any, tmp_path: Path, console: Any) -> None:
    responses = ["yes", "a much longer reply than the others", "no " * 9]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"instruction": "Name the oak.", "output": r}) + "\n" for r in responses))
    rows = grade(console, run=chain.reward, file=str(file), out=str(tmp_path / "scored.jsonl"))
    assert [row["completion"] for row in rows] == responses and rows[1]["where"] == f"{file}:2"
    assert [row["reward"] for row in rows] == pytest.approx(by_hand(chain, [PROMPT + r for r in responses]), abs=1e-4)
    written = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert written == rows
    assert "of 3 replies" in console.text


def test_one_bad_row_leaves_the_others_to_be_scored(tmp_path: Path, console: Any) -> None:
    """It was skipped where rows are read, but not where their format is looked for."""
    (tmp_path / "r.py").write_text(
        "def size(completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    )
    rows = [{"prompt": "a", "completion": "x"}, {"prompt": "", "completion": "x"}, {"prompt": "b", "completion": "yy"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "b", "completion": "zzz"}]))
    found = grade(console, function=f"{tmp_path / 'r.py'}:size", file=str(file))
    assert [row["reward"] for row in found] == [1.0, 2.0, 3.0]
    assert any("1 skipped: empty prompt" in line for line in console.warnings)


def test_a_sharegpt_file_has_replies_or_pairs(tmp_path: Path, console: Any) -> None:
    (tmp_path / "r.py").write_text(
        "def size(completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    )
    asked, said = {"from": "human", "value": "a"}, [{"from": "gpt", "value": text} for text in ("bb", "c")]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"conversations": [asked, said[0]]}) + "\n")
    (row,) = grade(console, function=f"{tmp_path / 'r.py'}:size", file=str(file))
    assert (row["prompt"], row["completion"], row["reward"]) == ("Human: a\n\nAssistant:", "bb", 2.0)
    file.write_text(json.dumps({"conversations": [asked], "chosen": said[0], "rejected": said[1]}) + "\n")
    (row,) = grade(console, function=f"{tmp_path / 'r.py'}:size", file=str(file))
    assert (row["reward_chosen"], row["reward_rejected"]) == (2.0, 1.0)


def test_pairs_tell_how_often_the_chosen_reply_wins(chain: Any, tmp_path: Path, console: Any) -> None:
    """The run learnt that "aaaa" beats "bb": right on 3 pairs, wrong on 1 whose label is turned; the draw is told."""
    texts = [("aaaa", "bb", 1), ("bb", "aaaa", 2), ("aaaa", "bb", 1), ("aaaa", "bb", 2), ("aaaa", "bb", 0)]
    rows = [
        {"instruction": f"Name the oak. {i}", "input": "", "output_1": a, "output_2": b, "preference": p}
        for i, (a, b, p) in enumerate(texts)
    ]
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(rows))
    found = grade(console, run=chain.reward, file=str(file))
    assert [row["correct"] for row in found] == [True, True, True, False]
    assert all((row["reward_chosen"] > row["reward_rejected"]) is row["correct"] for row in found)
    assert [row["chosen"] for row in found] == ["aaaa", "aaaa", "aaaa", "bb"]
    low, high = wilson_interval(3, 4, 0.95)
    assert f"accuracy 75.0% (95% interval {low:.1%} to {high:.1%}) of 4 pairs" in console.text
    assert "1 dropped: draw" in str(console.warnings)


def test_a_tie_counts_half() -> None:
    pairs = [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0), (2.0, 0.0)]
    text = pair_verdict([{"reward_chosen": a, "reward_rejected": b} for a, b in pairs])
    assert text.startswith("accuracy 62.5% ") and "1 ties counted half" in text and "mean margin 0.500" in text
    assert pair_verdict([]) == "no pair could be scored"


def test_a_merged_reward_model_scores_as_its_run(chain: Any, tmp_path: Path, console: Any) -> None:
    """F26: the head survives the merge."""
    from rlhf_ray.models.merge import merge_run

    merged = str(merge_run(chain.reward, tmp_path / "merged"))
    asked = {"prompt": "Name the oak.", "completion": "a tall tree"}
    (own,), (other,) = (grade(console, run=run, **asked) for run in (chain.reward, merged))
    assert other["reward"] == pytest.approx(own["reward"], abs=1e-4)
    (model,) = score(source=RewardSource(model=merged), num_threads=1, console=console, **asked)
    assert model["reward"] == other["reward"]
    assert console.text.count("reproduces the scores") == 3


def test_a_function_sees_prompts_texts_and_columns(tmp_path: Path, console: Any) -> None:
    rule = tmp_path / "rule.py"
    rule.write_text(
        "def score(prompts, completions, level):\n    return [len(p) + 10 * l for p, l in zip(prompts, level)]\n"
    )
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "abc", "completion": "x", "level": 2}\n{"prompt": "a", "completion": "y", "level": 1}\n'
    )
    rows = grade(console, function=f"{rule}:score", file=str(file))
    assert [row["reward"] for row in rows] == [23.0, 11.0]
    rule.write_text("def ids(prompts, completions, completion_ids):\n    return [0.0] * len(prompts)\n")
    with pytest.raises(ConfigError, match="completion_ids"):
        grade(console, function=f"{rule}:ids", file=str(file))


def test_what_cannot_be_scored_is_left_out_and_told(chain: Any, tmp_path: Path, console: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "fine"}\n{"prompt": "b", "completion": "' + "long " * 40 + '"}\n')
    rows = grade(console, run=chain.reward, file=str(file))
    assert [row["prompt"] for row in rows] == ["a"]
    assert "1 rows left out" in str(console.warnings) and "rows.jsonl:2" in str(console.warnings)
    with pytest.raises(DataError, match="cannot be scored"):
        grade(console, run=chain.reward, completion="long " * 40)


def test_a_reward_server_of_openrlhf_scores_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It reads `query`, and answers with `rewards` alone; null is no reward. By the command, whose key is sent and never shown."""
    file, keys = tmp_path / "rows.jsonl", tmp_path / "headers"
    rows = [{"instruction": f"Say {i}.", "output": "x" * i or "-"} for i in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys.write_text("Authorization: Bearer secret-of-mine\n")
    keys.chmod(0o600)
    with serving(lambda body: {"rewards": [None if q.endswith("-") else len(q) for q in body["query"]]}) as server:
        command = ["score", "--url", server.url, "--headers-file", str(keys), "--file", str(file), "--json"]
        assert main(command) == 0
    out, err = capfd.readouterr()
    assert [json.loads(line)["reward"] for line in out.splitlines()] == [6.0 + i for i in range(1, 5)]
    assert "mean reward" in err and "1 rows left out" in err and "secret-of-mine" not in out + err
    (body,), (headers,) = server.asked, server.seen
    assert headers["Authorization"] == "Bearer secret-of-mine" and not {"prompt_ids", "tokenizer_sha256"} & body.keys()
    assert body["prompts"] == [row["instruction"] for row in rows] and body["columns"]["output"][1] == "x"


NAN = Reply(b'{"rewards": [NaN]}')


@pytest.mark.parametrize(
    ("answer", "code", "told"),
    [
        ({"rewards": [1.0, 2.0]}, 75, "answered with the wrong number of rewards; expected 1; got 2 rewards"),
        ({"scores": [1.0]}, 75, "did not answer with rewards"),
        ({"ids": ["7"], "rewards": [1.0]}, 75, "answered with other ids than it was asked about"),
        ({"rewards": ["much"]}, 75, "did not return a list of numbers; expected list[float]; got 'much' for reply 0"),
        (NAN, 1, "not finite"),
        (Reply("no such model", 404), 75, "answered with status 404"),
        (Reply("busy", 503), 75, 'answered with status 503: "busy" (6 tries)'),
    ],
)
def test_a_reward_server_that_answers_wrongly_is_one_line(
    answer: Any, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(http_client, "FIRST_PAUSE_S", 0.001)
    with serving(lambda body: answer) as server:
        assert main(["score", "--url", server.url, "--completion", "x"]) == code
    out, err = capfd.readouterr()
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert told in line and server.url in line and out == ""


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (("--url", "http://127.0.0.1:1/score"), 3, "rewards.reward.url: 127.0.0.1:1 cannot be reached from this node"),
        (("--url", "reward-server"), 2, "score: url: is no URL of a server"),
        (("--url", "http://me:pw@localhost/score"), 2, "score: url: has credentials in it"),
        (("--url", "http://localhost/score", "--api-key-env", "NO_SUCH_KEY"), 2, "NO_SUCH_KEY is not set on this node"),
        (
            ("--url", "http://localhost/score", "--headers-file", "./none"),
            2,
            "rewards.reward.headers_file: cannot be read",
        ),
        (("--function", "r.py:score", "--headers-file", "h"), 2, "headers_file: only a reward with a url has one"),
        (("--url", "http://localhost/score", "--run", "r"), 2, "give exactly one of --run, --model, --function, --url"),
    ],
)
def test_a_reward_server_that_cannot_be_asked_is_one_line(
    options: tuple[str, ...], code: int, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", *options, "--completion", "x"]) == code
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
    assert told in line and ":pw@" not in line


def test_what_is_refused(chain: Any, tiny_llama: Callable[..., Path], tmp_path: Path, console: Any) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match="no replies to score"):
        grade(console, run=chain.reward, file=str(prompts))
    with pytest.raises(ConfigError, match="a completion or a file"):
        grade(console, run=chain.reward)
    with pytest.raises(ConfigError, match="no such folder"):
        grade(console, run="./nowhere", completion="x")
    with pytest.raises(ArtifactError, match="is not a reward run"):
        grade(console, run=chain.sft, completion="x")
    with pytest.raises(ArtifactError, match="has no reward head"):
        grade(console, run=f"{chain.sft}/adapter", completion="x")
    with pytest.raises(ArtifactError, match="another prompt template"):
        grade(console, run=chain.reward, completion="x", template="alpaca")
    with pytest.raises(ArtifactError, match="newly initialised"):
        score(source=RewardSource(model=str(tiny_llama(context=128))), completion="x", num_threads=1, console=console)


def test_the_command_prints_the_reward(chain: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_ray.runtime.session.usable_cores", lambda: 1)
    assert main(["score", "--run", chain.reward, "--prompt", "Name the oak.", "--completion", "aaaa", "--json"]) == 0
    row = json.loads(capfd.readouterr().out)
    assert row["completion"] == "aaaa" and isinstance(row["reward"], float)
