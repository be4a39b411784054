"""Which sweeps share a base, how many processes they take, and what `plan` says of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.sweep import SweepConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.sweep.capacity import Capacity
from rlhf_ray.sweep.planning import plan_sweep
from rlhf_ray.sweep.sharing import OF_THE_BASE, check_sharing, described, processes
from rlhf_ray.sweep.trials import check_trials, planned


@pytest.fixture
def sweep_of(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Callable[..., SweepConfig]:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"instruction": "Hello.", "input": ""}) + "\n")
    (tmp_path / "f.py").write_text("def score(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n")

    def make(**changes: Any) -> SweepConfig:
        ppo = {"data": {"train": str(tmp_path / "prompts.jsonl")}, "rewards": [{"function": f"{tmp_path}/f.py:score"}]}
        fields = {
            "output_dir": str(tmp_path / "sweep"),
            "model_name_or_path": str(tiny_llama()),
            "template": "none",
            "ppo": ppo | {"max_length": 64, "response_length": 16} | changes.pop("ppo", {}),
            "space": {"kl_coef": [0.01 * i for i in range(1, 9)]},
            "share_base": True,
        }
        return SweepConfig(**{**fields, **changes})

    return make


@pytest.mark.parametrize("name", ["dtype", "stop_token_ids", "attn_implementation"])
def test_a_field_of_the_base_cannot_vary(sweep_of: Any, name: str) -> None:
    values = {"dtype": ["float32", "auto"], "stop_token_ids": [[1], [2]], "attn_implementation": ["eager", "sdpa"]}
    config = sweep_of(space={name: values[name], "kl_coef": [0.1, 0.2]})
    jobs = check_trials(config, planned(config))
    with pytest.raises(ConfigError) as refused:
        check_sharing(config, jobs)
    assert [p.where for p in refused.value.problems] == [f"space.{name}"] and name in OF_THE_BASE
    check_sharing(config.model_copy(update={"share_base": False}), jobs)


def test_trials_fill_a_process_before_they_take_another(sweep_of: Any) -> None:
    fits = Capacity(True, {"CPU": 4.0, "GPU": 1.0}, 4, 2)
    assert processes(sweep_of(), fits, 8) == (1, 8)
    assert processes(sweep_of(), fits, 9) == (2, 9)
    assert processes(sweep_of(), fits, 40) == (2, 16)
    assert processes(sweep_of(max_concurrent_trials=3), fits, 40) == (1, 3)
    assert processes(sweep_of(trials_per_base=4), fits, 40) == (2, 8)
    assert described(sweep_of(), fits, 40) == "16 at once on 2 bases, in a process of 4 CPU, 1 GPU each"


def test_a_plan_counts_one_base_and_every_trials_own(sweep_of: Any) -> None:
    (one,) = plan_sweep(sweep_of(space={"kl_coef": [0.1]}), "cpu").stages[0].processes
    plan = plan_sweep(sweep_of(), "cpu")
    (eight,) = plan.stages[0].processes
    assert eight.role == "8 trials" and "8 trials, 8 at once on one base" in plan.placement
    for phase, parts in one.phases.items():
        of_all = {"adapters", "optimizer"} | ({"activations", "logits", "kv cache"} if phase == "sampling" else set())
        assert eight.phases[phase] == {part: size * (8 if part in of_all else 1) for part, size in parts.items()}
    assert one.phases["sampling"]["kv cache"] > 0 and one.phases["update"]["optimizer"] > 0
