"""Python rewards: what the function is given, and what it may answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.errors import ConfigError, Interrupted, InvariantError
from rlhf_ray.rewards import sources
from rlhf_ray.rewards.protocol import Texts
from rlhf_ray.rewards.sources import FunctionReward

Make = Callable[[str], FunctionReward]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(source of `score`) -> the reward."""

    def build(source: str) -> FunctionReward:
        path = tmp_path / "mine.py"
        path.write_text(source)
        return FunctionReward("mine", 1.0, f"{path}:score")

    return build


def texts(*columns: dict[str, Any]) -> Texts:
    rows = columns or ({}, {})
    return Texts([f"p{i}" for i in range(len(rows))], ["x", "yyy"][: len(rows)], [[5], [6, 7]][: len(rows)], rows)


def test_a_trl_reward_function_runs_unchanged(make: Make) -> None:
    """Keyword arguments, the data's columns by name, completion_ids, and **kwargs for what is not named."""
    reward = make(
        "def score(prompts, completions, answer, completion_ids, **kwargs):\n"
        "    assert prompts == ['p0', 'p1'] and 'level' in kwargs and 'only_here' not in kwargs\n"
        "    return [len(c) + a + len(i) for c, a, i in zip(completions, answer, completion_ids)]\n"
    )
    given = texts({"answer": 10, "level": 1, "only_here": 0}, {"answer": 20, "level": 2})
    assert torch.equal(reward.score_texts(given), torch.tensor([12.0, 25.0]))


def test_a_function_without_kwargs_gets_what_it_names(make: Make) -> None:
    reward = make("def score(prompts, completions):\n    return [1, 2]\n")
    assert reward.score_texts(texts({"answer": 1}, {"answer": 2})).tolist() == [1.0, 2.0]


def test_conversations_stay_conversations(make: Make) -> None:
    reward = make(
        "def score(prompts, completions, **kwargs):\n"
        "    assert [p[-1]['content'] for p in prompts] == ['hi', 'there']\n"
        "    assert [c[0]['role'] for c in completions] == ['assistant'] * 2\n"
        "    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    rows = [{"prompt": [{"role": "user", "content": word}]} for word in ("hi", "there")]
    assert reward.score_texts(texts(*rows)).tolist() == [1.0, 3.0]


def test_a_function_may_change_what_it_is_given(make: Make) -> None:
    """Two replies to one prompt share its row: neither the other one nor a later call sees the change."""
    reward = make(
        "def score(prompts, completions, tags, completion_ids, **kwargs):\n"
        "    found = [float(len(p) + len(t) + len(i)) for p, t, i in zip(prompts, tags, completion_ids)]\n"
        "    for p, c, t, i in zip(prompts, completions, tags, completion_ids):\n"
        "        p += c\n"
        "        p[0]['content'] += '!'\n"
        "        t.append(len(p)); i.append(0)\n"
        "    return [n + len(t) + len(p) for n, t, p in zip(found, tags, prompts)]\n"
    )
    row: dict[str, Any] = {"prompt": [{"role": "user", "content": "hi"}], "tags": []}
    given = texts(row, row)
    assert reward.score_texts(given).tolist() == [5.0, 6.0] == reward.score_texts(given).tolist()
    assert row == {"prompt": [{"role": "user", "content": "hi"}], "tags": []}
    assert given.completion_ids == [[5], [6, 7]]


RANDOM = """
import random
import numpy
import torch

def score(prompts, completions):
    return [random.random() + numpy.random.rand() + float(torch.rand(())) for _ in prompts]
"""


def test_random_numbers_are_those_of_the_texts(make: Make) -> None:
    """A chunk that is scored again, elsewhere or after a restart, gets the rewards that it had."""
    reward = make(RANDOM)
    first = reward.score_texts(texts())
    torch.manual_seed(7)
    random.seed(7)
    before = random.getstate(), torch.get_rng_state()
    assert torch.equal(reward.score_texts(texts()), first) and first[0] != first[1]
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    other = Texts(["p0", "p1"], ["x", "zzz"], [[5], [6, 7]], ({}, {}))
    assert not torch.equal(reward.score_texts(other), first)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return [1.0]", "returned the wrong number of rewards; expected 2; got 1"),
        ("return 3.0", "did not return a list of numbers; expected list\\[float\\]; got float"),
        ("return ['good', 1]", "did not return a list of numbers; expected list\\[float\\]; got 'good' for reply 0"),
        ("return ['1', '2']", "did not return a list of numbers; expected list\\[float\\]; got '1' for reply 0"),
        ("return [1, {}]", "did not return a list of numbers; expected list\\[float\\]; got dict for reply 1"),
        ("return {0: 1.0, 1: 2.0}", "did not return a list of numbers; expected list\\[float\\]; got dict"),
        ("return '12'", "did not return a list of numbers; expected list\\[float\\]; got str"),
        ("return [1, 10**9999]", "did not return .*; got int over the largest float for reply 1"),
        ("return (int(c) for c in completions)", "did not return .*; got generator"),
        ("import torch; return torch.zeros(2, 2)", "did not return .*; got Tensor for reply 0"),
        ("raise KeyError('label')", r"raised KeyError 3 times: 'label' \(mine.py:2\)"),
        ("import json; return json.loads(completions[0])", r"raised JSONDecodeError 3 times: .*\(mine.py:2\)"),
        ("raise SystemExit(0)", "raised SystemExit 3 times: 0"),
    ],
)
def test_a_bad_answer_is_named_with_the_function(
    make: Make, body: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug is in the user's file, not in the package: no `a bug in rlhf_ray`."""
    monkeypatch.setattr(sources, "PAUSES_S", (0.0, 0.0))
    with pytest.raises(Interrupted, match=rf"reward mine \(.*mine.py:score\): {says}.*; fix: fix the function$"):
        make(f"def score(prompts, completions):\n    {body}\n").score_texts(texts())


def test_a_missing_number_stays_missing_and_none_is_an_answer(make: Make) -> None:
    """None: the function does not apply to the reply. NaN is a fault, for the loop to count and leave out; where it may not be, the
    row is named."""
    found = make("def score(prompts, completions):\n    return [1.0, None]\n").score_texts(texts())
    assert found[0] == 1.0 and bool(torch.isnan(found[1]))
    sources.none_broken(found, "here")
    broken = make("def score(prompts, completions):\n    return [1.0, float('nan')]\n").score_texts(texts())
    assert broken.tolist() == [1.0, float("inf")]
    with pytest.raises(InvariantError, match=r"here: reward of row 1 is not finite \(1 of 2\); got inf"):
        sources.none_broken(broken, "here")


def test_a_service_that_comes_back_is_asked_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 5: a server error, twice; then the same question is answered, and nobody has made up a reward."""
    monkeypatch.setattr(sources, "PAUSES_S", (0.0, 0.0))
    reward = make(
        "ASKED = []\n"
        "def score(prompts, completions):\n"
        "    ASKED.append(list(completions))\n"
        "    if len(ASKED) < 3:\n        raise ConnectionError('503')\n"
        "    assert ASKED[0] == ASKED[2]\n    return [1, 2]\n"
    )
    assert reward.score_texts(texts()).tolist() == [1.0, 2.0]


def test_what_cannot_be_loaded_is_a_configuration_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.py"
    path.write_text("import nowhere_to_be_found\n")
    with pytest.raises(ConfigError, match=r"importing .*mine.py failed: ModuleNotFoundError: .*\(mine.py:1\)"):
        FunctionReward("mine", 1.0, f"{path}:score")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"importing mine failed: ModuleNotFoundError: .*\(mine.py:1\)"):
        FunctionReward("mine", 1.0, "mine:score")
    path.write_text("import argparse\nargparse.ArgumentParser().parse_args(['ppo', 'job.yaml'])\n")
    with pytest.raises(ConfigError, match=r"importing .*mine.py failed: SystemExit: 2"):
        FunctionReward("mine", 1.0, f"{path}:score")
    path.write_text("def other(prompts, completions):\n    return []\n")
    with pytest.raises(ConfigError, match="has no function score; expected one of other"):
        FunctionReward("mine", 1.0, f"{path}:score")
