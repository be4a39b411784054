"""Training on files that are larger than memory: the run that it is without data.streaming, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import DPOConfig, RewardConfig, SFTConfig
from rlhf_ray.data import stored
from rlhf_ray.errors import DataError, Interrupted
from rlhf_ray.stages.resume import resume
from rlhf_ray.stages.start import dpo, reward, sft
from tests.runs import equal, lasting_rows, weights, yes_or_no

pytestmark = pytest.mark.integration
HELD_OUT = {"held_out_fraction": 0.3}


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "SLICE", 16)


@pytest.mark.parametrize(("kind", "start", "name"), [(DPOConfig, dpo, "dpo"), (RewardConfig, reward, "reward")])
def test_pairs_are_learnt_as_without_it(
    kind: Any, start: Any, name: str, supervised_job: Callable[..., Any], console: Any
) -> None:
    runs = [
        start(supervised_job(kind, f"{name}_{on}", yes_or_no(120), data={**HELD_OUT, "streaming": on}), console)
        for on in (False, True)
    ]
    assert equal(*map(weights, runs))
    assert lasting_rows(runs[0]) == lasting_rows(runs[1])


def test_a_stopped_run_goes_on_with_the_same_rows(
    supervised_job: Callable[..., Any], console: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of what was tokenised stays in the run folder: rows that have changed are told, and no old ones learnt."""

    def job(name: str, streaming: bool) -> SFTConfig:
        rows = [{"prompt": f"Say {i}.", "completion": "abcdefghij"[i % 10] * (i % 5 + 1)} for i in range(100)]
        made: SFTConfig = supervised_job(
            SFTConfig, name, rows, data={**HELD_OUT, "streaming": streaming}, lora={"r": 4, "lora_alpha": 8}
        )
        return made

    whole = sft(job("whole", False), console)
    with monkeypatch.context() as patch:
        patch.setenv("RLHF_RAY_FAULT", "learner:update:step=3:term")
        with pytest.raises(Interrupted, match="step 3 is saved"):
            sft(job("stopped", True), console)
    data = tmp_path / "stopped.jsonl"
    kept = data.read_text()
    data.write_text(kept.replace("Say 7.", "Say 7!"))
    with pytest.raises(DataError, match=r"stopped\.jsonl: data sha256 differs from the checkpoint's"):
        resume(tmp_path / "stopped", console)
    data.write_text(kept)
    run = resume(tmp_path / "stopped", console)
    assert equal(weights(whole), weights(run)) and lasting_rows(whole) == lasting_rows(run)
    assert sorted(os.listdir(whole.run_dir)) == sorted(os.listdir(run.run_dir))
